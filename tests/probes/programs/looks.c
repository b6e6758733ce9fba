// A program that looks for traces of a probe on itself: TF in its flags, its return address, its own code.
int looks(const unsigned char *start, const unsigned char *end, unsigned long expected);
#ifdef __x86_64__
__asm__(".globl looks, looks_end; looks:\n"
        "pushfq; pop %rax; and $0x100, %eax; jne 9f\n"              // TF
        "lea back(%rip), %rax; cmp %rax, (%rsp); jne 9f\n"          // the caller
        "xor %eax, %eax; mov %rdi, %rcx\n"
        "1: movzbl (%rcx), %r8d; add %r8, %rax; inc %rcx; cmp %rsi, %rcx; jb 1b\n"
        "cmp %rdx, %rax; jne 9f\n"
        "xor %eax, %eax; ret\n"
        "9: mov $1, %eax; ret\n"
        "looks_end: nop\n");
#define TEMPORARY "r8"
#define LEAVE "syscall" : : "a"(60), "D"
#else
__asm__(".globl looks, looks_end; looks:\n"
        "pushfl; pop %eax; and $0x100, %eax; jne 9f\n"
        "cmpl $back, (%esp); jne 9f\n"
        "xor %eax, %eax; mov %edi, %ecx\n"
        "1: movzbl (%ecx), %ebx; add %ebx, %eax; inc %ecx; cmp %esi, %ecx; jb 1b\n"
        "cmp %edx, %eax; jne 9f\n"
        "xor %eax, %eax; ret\n"
        "9: mov $1, %eax; ret\n"
        "looks_end: nop\n");
#define TEMPORARY "ebx"
#define LEAVE "int $0x80" : : "a"(1), "b"
#endif
extern const unsigned char looks_end[];

__attribute__((used, noinline)) long ask(unsigned long expected) {
    long answer;
    __asm__ volatile("call looks; back:" : "=a"(answer) : "D"(looks), "S"(looks_end), "d"(expected)
                     : "cx", TEMPORARY, "memory", "cc");
    return answer;
}

__attribute__((used, noinline)) void run(void) {
    unsigned long sum = 0;
    for (const unsigned char *at = (const unsigned char *)looks; at < looks_end; at++)
        sum += *at;
    long answer = ask(sum);
    __asm__ volatile(LEAVE(answer) : "memory");
}

__asm__(".globl _start; _start: call run");
