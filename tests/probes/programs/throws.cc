// C++ exceptions through probed functions: caught deeper, caught outside, thrown again.
#include <cstdio>
#include <stdexcept>

#define PROBED __attribute__((noinline, noclone))

extern "C" {
PROBED long thrower(long n) {
    if (n == 0)
        throw std::runtime_error("thrown");
    long got = thrower(n - 1);
    __asm__ volatile("" ::: "memory");
    return got + 1;
}

PROBED long catcher(long n) {
    try {
        return thrower(n);
    } catch (const std::exception &) {
        return -1;
    }
}

PROBED long passer(long n) {
    try {
        return thrower(n) + 1;
    } catch (...) {
        throw;
    }
}
}

int main() {
    long sum = 0;
    for (int i = 0; i < 3; i++)
        sum += catcher(2);
    try {
        sum += passer(1);
    } catch (const std::exception &) {
        sum += 100;
    }
    sum += catcher(0);
    std::printf("sum %ld\n", sum);
    return 0;
}
