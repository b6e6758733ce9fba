// Every store of a loop faults, and a signal's handler makes it succeed; meanwhile a timer sends signals of its own.
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/time.h>

#define PAGE 4096
#define STORES 300

static sigjmp_buf there;
static volatile int jumping, alarms;

// One store to each of `count` pages: mov, add, dec, jne.
void stores(char *at, long count);
__asm__(".globl stores, stores_end; .type stores, @function; stores:\n"
#ifdef __x86_64__
        "xor %eax, %eax; 1: movb $1, (%rdi); add $4096, %rdi; dec %rsi; jne 1b; ret\n"
#else
        "mov 4(%esp), %ecx; mov 8(%esp), %edx\n"
        "1: movb $1, (%ecx); add $4096, %ecx; dec %edx; jne 1b; ret\n"
#endif
        "stores_end: nop\n");

void refused(int number, siginfo_t *info, void *context) {
    if (jumping)
        siglongjmp(there, 1);
    mprotect((void *)((long)info->si_addr & -PAGE), PAGE, PROT_READ | PROT_WRITE);
}

void rang(int number) { alarms++; }

int main(void) {
    struct sigaction action = {.sa_sigaction = refused, .sa_flags = SA_SIGINFO};
    struct itimerval often = {{0, 1000}, {0, 1000}};
    sigaction(SIGSEGV, &action, 0);
    signal(SIGALRM, rang);
    setitimer(ITIMER_REAL, &often, 0);
    char *pages = mmap(0, STORES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stores(pages, STORES);
    while (alarms < 3)
        stores(pages, STORES);
    jumping = 1;
    mprotect(pages, PAGE, PROT_NONE);
    if (!sigsetjmp(there, 1))
        stores(pages, 1);
    long sum = 0;
    for (long i = 1; i < STORES; i++)
        sum += pages[i * PAGE];
    printf("sum %ld\n", sum);
    return 0;
}
