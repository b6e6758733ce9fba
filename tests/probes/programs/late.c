// Maps a file that lies on a disk, and hands on a string in it before anybody has read it, and after.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

__attribute__((noinline)) void show(const volatile char *string) { __asm__ volatile("" : : "r"(string) : "memory"); }

int main(int count, char **arguments) {
    int file = open(arguments[1], O_RDONLY);
    const volatile char *text = mmap(0, 4096, PROT_READ, MAP_PRIVATE, file, 0);
    show(text);
    int letter = *text;
    show(text);
    return letter != 'f';
}
