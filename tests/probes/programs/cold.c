// Needs no library, so that it is made for 32 bits as well: three calls of a function that has a page of its own.
#define PAGE 4096

#ifdef __x86_64__
enum { EXIT = 60, PAUSE = 34 };
#else
enum { EXIT = 1, PAUSE = 29 };
#endif

static void ask(long number, long argument) {
#ifdef __x86_64__
    __asm__ volatile("syscall" : "+a"(number) : "D"(argument) : "rcx", "r11", "memory");
#else
    __asm__ volatile("int $0x80" : "+a"(number) : "b"(argument) : "memory");
#endif
}

#ifdef MOVED // cold() has another place in the file
__attribute__((noinline, aligned(PAGE), section(".text.before"), used)) static void before(void) { __asm__(".skip 8192"); }
#endif

__attribute__((noinline, aligned(PAGE), section(".text.cold"))) long cold(long n) {
#ifdef STAYS // until a signal ends it
    while (n == 2)
        ask(PAUSE, 0);
#endif
    __asm__ volatile("" ::: "memory");
    return n + 1;
}

__attribute__((aligned(PAGE), section(".text.next"), used)) static void next(void) {}

__attribute__((used, noinline)) void run(void) {
    long sum = 0;
    for (long i = 0; i < 3; i++)
        sum += cold(i);
    ask(EXIT, sum != 6);
}

__asm__(".globl _start; _start: call run");
