// Functions left by every way there is. Each scene prints how often work() was entered and how often it came back.
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

static jmp_buf there;
static ucontext_t main_context, coroutine;

#define PROBED __attribute__((noinline, noclone))

PROBED long leaf(long n) { __asm__ volatile("" ::: "memory"); return n + 1; }

PROBED long jumps(long n) {
    if (n == 0)
        longjmp(there, 1);
    long got = jumps(n - 1);
    __asm__ volatile("" ::: "memory");
    return got + 1;
}

PROBED long tail(long n) { __asm__ volatile("" ::: "memory"); return leaf(n + 10); }

PROBED long yields(long n) {
    swapcontext(&coroutine, &main_context);
    long got = leaf(n);
    __asm__ volatile("" ::: "memory");
    return got + 1;
}

// Copies the stack above it elsewhere, and returns there: it was entered on one stack and is left on another.
long moves(void *to);
__asm__(".globl moves; .type moves, @function; moves:\n"
#ifdef __x86_64__
        "mov %rdi, %rdx; mov %rsp, %rsi; mov $512, %ecx; rep movsb; mov %rdx, %rsp; mov $42, %eax; ret\n"
#else
        "mov 4(%esp), %edx; xor %ecx, %ecx\n"
        "1: mov (%esp,%ecx,4), %eax; mov %eax, (%edx,%ecx,4); inc %ecx; cmp $128, %ecx; jb 1b\n"
        "mov %edx, %esp; mov $42, %eax; ret\n"
#endif
        ".size moves, . - moves\n");

static void body(void) {
    for (;;) {
        yields(5);
        swapcontext(&coroutine, &main_context);
    }
}

PROBED long dies(long n) {
    if (n)
        pthread_exit(0);
    _exit(3);
}

static void *run(void *argument) { return (void *)dies(1); }

PROBED long execs(char **argv) {
    execv(argv[0], argv);
    return 1;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "again"))
        return leaf(0) != 1;
    for (int i = 0; i < 3; i++)
        if (!setjmp(there))
            jumps(4);
    leaf(1);
    printf("tail %ld\n", tail(1));
    static char stack[65536];
    getcontext(&coroutine);
    coroutine.uc_stack.ss_sp = stack;
    coroutine.uc_stack.ss_size = sizeof stack;
    makecontext(&coroutine, body, 0);
    for (int i = 0; i < 6; i++) {
        swapcontext(&main_context, &coroutine);
        leaf(2);
    }
    pthread_t thread;
    pthread_create(&thread, 0, run, 0);
    pthread_join(thread, 0);
    int status;
    if (!fork())
        dies(0);
    wait(&status);
    if (!fork()) {
        char *again[] = {argv[0], "again", 0};
        execs(again);
    }
    wait(&status);
    static char elsewhere[65536];
    printf("moved %ld\n", moves(elsewhere + 32768));
    leaf(9);
    exit(0);
}
