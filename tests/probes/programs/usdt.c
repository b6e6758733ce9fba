// A probe of the program's own, as sys/sdt.h makes them: a counter in its data says whether anybody looks.
// Alone it makes three rounds; its status is the counter times 16 plus the probes passed. With an argument it reads
// lines and tells the counter after each: `f` asks a forked child first, `s` stores one more itself, `q` ends it.

#ifdef __x86_64__
enum { READ = 0, WRITE = 1, FORK = 57, EXIT = 60, WAIT4 = 61 };
static long call(long number, long a, long b, long c) {
    long result;
    register long d __asm__("r10") = 0;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(d) : "rcx", "r11", "memory");
    return result;
}
#else
enum { READ = 3, WRITE = 4, FORK = 2, EXIT = 1, WAIT4 = 114 };
static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(0) : "memory");
    return result;
}
#endif

__attribute__((section(".probes"), aligned(4096))) volatile struct {
    unsigned short counter;
    char rest[8190];
} semaphore = {0, {1}};

__attribute__((noinline, used)) int passed(int number) {
    __asm__ volatile("probe: .globl probe; nop" : "+r"(number));
    return 1;
}

static int look(int number) { return semaphore.counter ? passed(number) : 0; }

static void tell(char who) {
    char line[] = {who, '=', '0' + semaphore.counter, 'p', '0' + look(9), '\n'};
    call(WRITE, 1, (long)line, sizeof line);
}

__attribute__((used)) void run(long *arguments) {
    char letter;
    if (arguments[0] == 1) {
        int sum = 0;
        for (int number = 0; number < 3; number++)
            sum += look(number);
        call(EXIT, semaphore.counter * 16 + sum, 0, 0);
    }
    tell('b');
    while (call(READ, 0, (long)&letter, 1) == 1 && letter != 'q') {
        if (letter == 's')
            semaphore.counter++;
        if (letter == 'f') {
            if (!call(FORK, 0, 0, 0)) {
                tell('c');
                call(EXIT, 0, 0, 0);
            }
            call(WAIT4, -1, 0, 0);
        }
        if (letter == '\n')
            tell('v');
    }
    call(EXIT, 0, 0, 0);
}

#ifdef __x86_64__
__asm__(".globl _start; _start: mov %rsp, %rdi; call run");
#else
__asm__(".globl _start; _start: push %esp; call run");
#endif
