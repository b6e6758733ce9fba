// Hands on strings whose pages nobody has touched: of the file, of empty memory, and where nothing is mapped.
__attribute__((aligned(4096))) static const char text[4096] = "in the file only";
__attribute__((aligned(4096))) static char empty[8192];

__attribute__((noinline)) void show(const char *string) { __asm__ volatile("" : : "r"(string) : "memory"); }

__attribute__((used)) void run(void) {
    show(text);
    show(empty + 4096);
    show((const char *)64);
    __asm__ volatile("syscall" : : "a"(60), "D"(0));
}

__asm__(".globl _start; _start: call run");
