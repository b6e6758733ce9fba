// A library with one function, which runs wherever it is mapped.
long place(long n) {
    __asm__ volatile("" ::: "memory");
    return n + 1;
}
