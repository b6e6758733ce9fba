// A dynamically linked program: allocates, prints, forks, opens a library a second way and runs threads.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

__attribute__((noinline)) long work(long n, const char *name) {
    __asm__ volatile("" ::: "memory");
    return n * 3 + name[0];
}

static void *run(void *argument) {
    long sum = 0;
    for (long i = 0; i < 10; i++)
        sum += work(i, argument);
    return (void *)sum;
}

int main(int argc, char **argv) {
    char *kept = malloc(12345);
    strcpy(kept, "kept");
    puts("hello from a dynamic program");
    long sum = work(7, kept);
    pid_t child = fork();
    if (child == 0) {
        sum += work(100, "child");
        puts("child");
        exit(sum == 7 * 3 + 'k' + 300 + 'c' ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], 0, run, "thread");
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], 0);
    printf("status %d\n", status);
    free(kept);
    return 0;
}
