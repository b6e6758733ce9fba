// Three calls of a function that reads a byte before it returns.

__attribute__((noinline, used)) int waits(int number) {
    char byte;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(0L), "D"(0L), "S"(&byte), "d"(1L) : "rcx", "r11", "memory");
    return number + 1;
}

__attribute__((used)) void run(void) {
    int sum = 0;
    for (int number = 0; number < 3; number++)
        sum += waits(number);
    __asm__ volatile("syscall" ::"a"(60L), "D"((long)sum));
}

__asm__(".globl _start; _start: call run");
