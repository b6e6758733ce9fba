// For ever: calls a function, or, where it is given a file, maps it, writes to each of its pages and unmaps it.
#define PAGE 4096
enum { OPEN = 2, LSEEK = 8, MMAP = 9, MUNMAP = 11 };

static long ask(long number, long a, long b, long c, long d, long e) {
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = 0;
    long answer;
    __asm__ volatile("syscall" : "=a"(answer) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return answer;
}

__attribute__((noinline)) void called(void) { __asm__ volatile(""); }

__attribute__((used, noinline)) void run(long *stack) {
    if (stack[0] == 1)
        for (;;)
            called();
    long file = ask(OPEN, stack[2], 0, 0, 0, 0), size = ask(LSEEK, file, 0, 2, 0, 0);
    for (;;) {
        char *start = (char *)ask(MMAP, 0, size, 3, 2, file); // to read and write, private
        for (long at = 0; at < size; at += PAGE)
            start[at] = 1;
        ask(MUNMAP, (long)start, size, 0, 0, 0);
    }
}

__asm__(".globl _start; _start: mov %rsp, %rdi; call run");
