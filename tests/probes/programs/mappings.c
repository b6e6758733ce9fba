// Maps a library's file in every way there is and calls its function there, with another number each time.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE 0x10000
typedef long function(long);

static function *find(void *library) { return (function *)dlsym(library, "place"); }

static void finish(int child) {
    int status;
    if (waitpid(child, &status, 0) != child || status)
        exit(1);
}

int main(int argc, char **argv) {
    if (argc > 2)
        return find(dlopen(argv[1], RTLD_NOW))(20) != 21; // after exec
    void *library = dlopen(argv[1], RTLD_NOW);
    function *loaded = find(library);
    Dl_info info;
    dladdr((void *)loaded, &info);
    long offset = (char *)loaded - (char *)info.dli_fbase; // as the linker lays libraries out
    int file = open(argv[1], O_RDONLY);
    char *again = mmap(0, SIZE, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0);
    function *second = (function *)(again + offset);
    long sum = loaded(1) + second(2) + loaded(3);
    int child = fork();
    if (!child)
        _exit(loaded(4) + second(5) != 11);
    finish(child);
    child = vfork();
    if (!child) {
        execl(argv[0], argv[0], argv[1], "again", NULL);
        _exit(1);
    }
    finish(child);
    dlclose(library);
    sum += second(6);
    char *room = mmap(0, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *moved = mremap(again, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    sum += ((function *)(moved + offset))(7);
    munmap(moved, SIZE);
    char *late = mmap(0, SIZE, PROT_READ, MAP_SHARED, file, 0);
    mprotect(late, SIZE, PROT_READ | PROT_EXEC);
    sum += ((function *)(late + offset))(8);
    munmap(late, SIZE);
    char *copy = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    copy[offset] = copy[offset]; // a page of the process's own from here on
    mprotect(copy, SIZE, PROT_READ | PROT_EXEC);
    sum += ((function *)(copy + offset))(9);
    library = dlopen(argv[1], RTLD_NOW);
    printf("sum %ld\n", sum + find(library)(10));
    return 0;
}
