// What becomes of pages of code: given back and read anew, truncated with their file, mapped over without a munmap(),
// copied by a store. Its status is 0 where every call has returned what it should.

#ifdef __x86_64__
enum { READ = 0, WRITE = 1, OPEN = 2, MMAP = 9, MPROTECT = 10, MADVISE = 28, EXIT = 60 };
static long call(long number, long a, long b, long c, long d, long e) {
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = 0;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}
#else
enum { READ = 3, WRITE = 4, OPEN = 5, MMAP = 192, MPROTECT = 125, MADVISE = 219, EXIT = 1 };
static long call(long number, long a, long b, long c, long d, long e) {
    long result;  // the sixth argument, ebp, is whatever it is: a map's offset, in pages, is 0 where it matters
    __asm__ volatile("push %%ebp; xor %%ebp, %%ebp; int $0x80; pop %%ebp"
                     : "=a"(result)
                     : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
                     : "memory");
    return result;
}
#endif
enum { PAGE = 4096, RW = 3, RX = 5, RWX = 7, PRIVATE = 2, ANONYMOUS = 32, FIXED = 16, DONTNEED = 4 };

// A page of its own. argv[1] is a file of this code alone.
__attribute__((section(".hot"), aligned(PAGE), used, noinline)) int target(int number) {
    __asm__ volatile("" : "+r"(number));
    return number + 1;
}

__attribute__((used, noinline)) void copies(void *to, const void *from, long size) {
    __asm__ volatile("moves: .globl moves; rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
}

static int failed;
static void expect(int passed) { failed |= !passed; }

__attribute__((used)) void run(char **argv) {
    char *page = (char *)((long)target & -PAGE), letter;
    int (*mapped)(int), fd;
    expect(target(1) == 2);
    expect(call(MADVISE, (long)page, PAGE, DONTNEED, 0, 0) == 0);
    expect(target(2) == 3);

    fd = call(OPEN, (long)argv[1], 0, 0, 0, 0);
    page = (char *)call(MMAP, 0, PAGE, RX, PRIVATE, fd);  // this file's only page is the code
    mapped = (int (*)(int))page;
    expect(mapped(3) == 4);
    call(WRITE, 1, (long)"truncate\n", 9, 0, 0);
    call(READ, 0, (long)&letter, 1, 0, 0);  // truncated and written again by now
    expect(mapped(4) == 5);
    page = (char *)call(MMAP, (long)page, PAGE, RWX, PRIVATE | ANONYMOUS | FIXED, -1);
    copies(page, "\xb8\x09\0\0\0\xc3", 6);  // mov $9, %eax; ret
    expect(mapped(5) == 9);

    page = (char *)call(MMAP, 0, 3 * PAGE, RW, PRIVATE | ANONYMOUS, -1);
    copies(page + 100, page + PAGE, PAGE + 10);  // faults on the way

    page = (char *)((long)target & -PAGE);
    call(MPROTECT, (long)page, PAGE, RWX, 0, 0);
    page[PAGE - 1] = 1;
    call(WRITE, 1, (long)"copied\n", 7, 0, 0);
    call(READ, 0, (long)&letter, 1, 0, 0);
    expect(target(6) == 7);
    call(EXIT, failed, 0, 0, 0, 0);
}

#ifdef __x86_64__
__asm__(".globl _start; _start: lea 8(%rsp), %rdi; call run");
#else
__asm__(".globl _start; _start: lea 4(%esp), %eax; push %eax; call run");
#endif
