/* A socket with a classic filter, which the kernel turns into machine code: three datagrams to itself, then none. */
#include <arpa/inet.h>
#include <linux/filter.h>
#include <stdio.h>
#include <sys/socket.h>

int main(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_LEN, 0),
        BPF_STMT(BPF_ALU | BPF_ADD | BPF_K, 1000),
        BPF_STMT(BPF_RET | BPF_A, 0),
    };
    struct sock_fprog program = {.len = 3, .filter = code};
    struct sockaddr_in self = {.sin_family = AF_INET, .sin_port = htons(4000), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    char text[16];
    int s = socket(AF_INET, SOCK_DGRAM, 0), got = 0;

    if (setsockopt(s, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) || bind(s, (void *)&self, sizeof self))
        return 1;
    for (int i = 0; i < 3; i++) {
        sendto(s, "datagram", 8, 0, (void *)&self, sizeof self);
        got += recv(s, text, sizeof text, 0) == 8;
    }
    printf("%d of 3\n", got);
    return setsockopt(s, SOL_SOCKET, SO_DETACH_FILTER, &program, sizeof program) ? 2 : 0;
}
