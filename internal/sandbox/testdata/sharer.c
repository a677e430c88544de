// A server of two processes that share 16 MiB of memory, of which 3 MiB are
// written, in three places. It answers every connection with a sum of all of
// it, and with what the other process did to it.
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MIB = 1 << 20 };

int main(void) {
	unsigned char *m = mmap(0, 16 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	volatile unsigned *asked = (unsigned *)(m + 5 * MIB), *answered = asked + 1;
	for (int i = 0; i < MIB; i++) m[i] = i * 7, m[8 * MIB + i] = i * 11, m[15 * MIB + i] = i * 13;
	if (fork() == 0)
		for (;; usleep(500))
			if (*answered != *asked * 2) *answered = *asked * 2;
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(8080)};
	int s = socket(AF_INET, SOCK_STREAM, 0);
	bind(s, (struct sockaddr *)&a, sizeof a);
	listen(s, 16);
	for (;;) {
		char b[256];
		int c = accept(s, 0, 0);
		if (read(c, b, sizeof b) > 0) {
			unsigned sum = 0, n = ++*asked;
			while (*answered != n * 2) usleep(500);
			for (int i = 0; i < 16 * MIB; i++)
				if (i / MIB != 5) sum = sum * 31 + m[i];
			int len = snprintf(b, sizeof b, "HTTP/1.0 200 OK\r\n\r\n%08x %u\n", sum, *answered);
			write(c, b, len);
		}
		close(c);
	}
}
