// Sleeps for ever in a function.
#include <unistd.h>

__attribute__((noinline)) long sleeps(long n) {
    pause();
    return n;
}

int main(void) { return (int)sleeps(1); }
