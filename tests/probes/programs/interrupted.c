// Looks at where signals find it: SIGINT while it computes, SIGSEGV at a load from a page that comes and goes. Exits with
// 1 where a signal's context is not of this program: another address, or the trap flag set. Needs no library.
#define ROUNDS 400
#define PAGE 4096
#define TF 0x100
#define SIGINT 2
#define SIGSEGV 11
#define SA_SIGINFO 4
#define SA_RESTORER 0x04000000
#define PROT_NONE 0
#define PROT_READ 1

#ifdef __x86_64__
enum { WRITE = 1, MPROTECT = 10, SIGACTION = 13, SIGRETURN = 15, EXIT = 60, IP = 168, FLAGS = 176 };
static long call(long number, long a, long b, long c, long d) {
    register long r10 __asm__("r10") = d;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return result;
}
__asm__("restore: mov $15, %eax; syscall");
#else
enum { WRITE = 4, MPROTECT = 125, SIGACTION = 174, SIGRETURN = 173, EXIT = 1, IP = 76, FLAGS = 84 };
static long call(long number, long a, long b, long c, long d) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d) : "memory");
    return result;
}
__asm__("restore: mov $173, %eax; int $0x80");
#endif

struct action {
    void (*handler)(int, void *, char *);
    unsigned long flags;
    void (*restorer)(void);
    unsigned long mask[2];
};

extern void restore(void);
extern char looked_at[], loads[], looked_end[], last[];
static char page[PAGE] __attribute__((aligned(PAGE)));
static volatile long interrupts, faults, strange;

static void on_interrupt(int number, void *info, char *context) {
    unsigned long ip = *(unsigned long *)(context + IP), flags = *(unsigned long *)(context + FLAGS);
    interrupts++;
    strange += ip < (unsigned long)restore || ip >= (unsigned long)last || (flags & TF);
}

static void on_fault(int number, void *info, char *context) {
    unsigned long ip = *(unsigned long *)(context + IP), flags = *(unsigned long *)(context + FLAGS);
    faults++;
    strange += ip != (unsigned long)loads || (flags & TF);
    call(MPROTECT, (long)page, PAGE, PROT_READ, 0);
}

// Three instructions are probed: an add, the load that may fault, a jump.
long compute(long n, char *from);
__asm__(".globl compute, looked_at, loads, looked_end, jumps\n"
        "compute:\n"
#ifdef __x86_64__
        "looked_at: add $3, %rdi\n"
        "loads: movzbl (%rsi), %eax\n"
        "jumps: jmp 1f; ud2\n"
        "1: add %rdi, %rax; ret\n"
#else
        "mov 4(%esp), %ecx; mov 8(%esp), %edx\n"
        "looked_at: add $3, %ecx\n"
        "loads: movzbl (%edx), %eax\n"
        "jumps: jmp 1f; ud2\n"
        "1: add %ecx, %eax; ret\n"
#endif
        "looked_end:");

static void catch(long number, void (*handler)(int, void *, char *)) {
    struct action action = {handler, SA_SIGINFO | SA_RESTORER, restore, {0, 0}};
    call(SIGACTION, number, (long)&action, 0, 8);
}

__attribute__((used, noinline)) void run(void) {
    long wrong = 0;
    catch(SIGINT, on_interrupt);
    catch(SIGSEGV, on_fault);
    for (long i = 0; i < ROUNDS; i++) {
        if (i % 50 == 0)
            call(MPROTECT, (long)page, PAGE, PROT_NONE, 0);
        wrong += compute(i, page) != i + 3;
    }
    call(WRITE, 1, (long)"interrupted: ", 13, 0);
    call(WRITE, 1, (long)(interrupts >= 8 ? "often " : "seldom "), interrupts >= 8 ? 6 : 7, 0);
    call(WRITE, 1, (long)(faults == ROUNDS / 50 ? "faulted\n" : "odd\n"), faults == ROUNDS / 50 ? 8 : 4, 0);
    call(EXIT, strange || wrong, 0, 0, 0);
}

__asm__(".globl _start; _start: call run");
__attribute__((section(".text.zlast"), used)) static void end(void) {}
__asm__(".section .text.zzlast,\"ax\"; .globl last; last: nop; .text");
