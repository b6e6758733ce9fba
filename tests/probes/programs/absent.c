// Hands on strings whose pages nobody has touched: of the file, of empty memory, and where nothing is mapped. Of the empty
// pages one is stored to afterwards, and one never.
__attribute__((aligned(4096))) static const char text[4096] = "in the file only";
__attribute__((aligned(4096))) static volatile char empty[3 * 4096];

__attribute__((noinline)) void show(const volatile char *string) { __asm__ volatile("" : : "r"(string) : "memory"); }

__attribute__((used)) void run(void) {
    show(text);
    show(empty + 4096);
    show((const char *)64);
    show(empty + 8192);
    empty[4096] = 'x';
#ifdef __x86_64__
    __asm__ volatile("syscall" : : "a"(60), "D"(0));
#else
    __asm__ volatile("int $0x80" : : "a"(1), "b"(0));
#endif
}

__asm__(".globl _start; _start: call run");
