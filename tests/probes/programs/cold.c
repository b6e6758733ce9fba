// Needs no library, so that it is made for 32 bits as well: three calls of a function that has a page of its own.
#define PAGE 4096

#ifdef MOVED // cold() has another place in the file
__attribute__((noinline, aligned(PAGE), section(".text.before"), used)) static void before(void) { __asm__(".skip 8192"); }
#endif

__attribute__((noinline, aligned(PAGE), section(".text.cold"))) long cold(long n) {
    __asm__ volatile("" ::: "memory");
    return n + 1;
}

__attribute__((aligned(PAGE), section(".text.next"), used)) static void next(void) {}

static void leave(long status) {
#ifdef __x86_64__
    __asm__ volatile("syscall" : : "a"(60), "D"(status) : "rcx", "r11", "memory");
#else
    __asm__ volatile("int $0x80" : : "a"(1), "b"(status) : "memory");
#endif
}

__attribute__((used, noinline)) void run(void) {
    long sum = 0;
    for (long i = 0; i < 3; i++)
        sum += cold(i);
    leave(sum != 6);
}

__asm__(".globl _start; _start: call run");
