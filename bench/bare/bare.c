/*
 * bare PROGRAM ROOT DIR SECONDS CLIENTS GROUP...
 *
 * What the kernel alone takes for lives like those of fastcontainer's instances:
 * a process in namespaces of its own (user, mount, PID, network, IPC, UTS,
 * cgroup), in a new directory below each GROUP with limits, with an overlay of
 * ROOT, /proc, a few devices and a pair of interfaces; PROGRAM is executed, asked
 * once over TCP, killed, and everything is removed. Nothing else is done: no
 * daemon, no proxy, no pool, no seccomp, no log.
 *
 * It says a line for each life: how many microseconds it took until the answer,
 * or "-" if there was none. It wants a network namespace of its own, and DIR to
 * be empty.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/veth.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PORT = 8080, OURS = 2, FIRST = 1000, PATH = 4096 };

static const char *program, *root, *dir;
static char **groups;
static double until;
static int next;
static pthread_mutex_t out = PTHREAD_MUTEX_INITIALIZER;

static void die(const char *what)
{
	fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void put(const char *file, const char *text)
{
	int fd = open(file, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		die(file);
	if (write(fd, text, strlen(text)) < 0)
		die(file);
	close(fd);
}

/* A limit that this hierarchy has, if it is the one. */
static void limit(const char *group, const char *name, const char *text)
{
	char file[3 * PATH];
	snprintf(file, sizeof file, "%s/%s", group, name);
	if (access(file, W_OK) == 0)
		put(file, text);
}

/* Netlink: a request, its attributes, and the kernel's word on it. */
struct request {
	struct nlmsghdr head;
	union {
		struct ifinfomsg link;
		struct ifaddrmsg addr;
		struct rtmsg route;
	} body;
	char attributes[512];
};

static struct rtattr *add(struct request *r, int type, const void *data, int size)
{
	struct rtattr *a = (void *)((char *)r + NLMSG_ALIGN(r->head.nlmsg_len));
	a->rta_type = type;
	a->rta_len = RTA_LENGTH(size);
	if (size)
		memcpy(RTA_DATA(a), data, size);
	r->head.nlmsg_len = NLMSG_ALIGN(r->head.nlmsg_len) + RTA_ALIGN(a->rta_len);
	return a;
}

static void end(struct request *r, struct rtattr *a)
{
	a->rta_len = (char *)r + r->head.nlmsg_len - (char *)a;
}

static void ask(int nl, struct request *r, const char *what)
{
	char answer[8192];
	struct nlmsghdr *h = (void *)answer;
	r->head.nlmsg_flags |= NLM_F_REQUEST;
	if (r->head.nlmsg_type != RTM_GETLINK)
		r->head.nlmsg_flags |= NLM_F_ACK;
	if (send(nl, r, r->head.nlmsg_len, 0) < 0 || recv(nl, answer, sizeof answer, 0) < 0)
		die(what);
	if (h->nlmsg_type == NLMSG_ERROR && (errno = -((struct nlmsgerr *)NLMSG_DATA(h))->error))
		die(what);
}

#define REQUEST(r, kind, part, flags) \
	struct request r = { .head = { .nlmsg_type = kind, .nlmsg_flags = flags, .nlmsg_len = NLMSG_LENGTH(sizeof r.body.part) } }

static void raise_link(int nl, int index)
{
	REQUEST(r, RTM_NEWLINK, link, 0);
	r.body.link.ifi_index = index;
	r.body.link.ifi_flags = r.body.link.ifi_change = IFF_UP;
	ask(nl, &r, "raise interface");
}

/* Whoever asks about an interface that was raised makes the kernel use it at once. */
static void settle(int nl, int index)
{
	REQUEST(r, RTM_GETLINK, link, 0);
	r.body.link.ifi_index = index;
	ask(nl, &r, "look at interface");
}

static void address(int nl, int index, in_addr_t a)
{
	REQUEST(r, RTM_NEWADDR, addr, NLM_F_CREATE);
	r.body.addr.ifa_family = AF_INET;
	r.body.addr.ifa_prefixlen = 32;
	r.body.addr.ifa_index = index;
	add(&r, IFA_LOCAL, &a, 4);
	add(&r, IFA_ADDRESS, &a, 4);
	ask(nl, &r, "give address");
}

static void route(int nl, int index, in_addr_t to, in_addr_t by)
{
	REQUEST(r, RTM_NEWROUTE, route, NLM_F_CREATE);
	r.body.route.rtm_family = AF_INET;
	r.body.route.rtm_table = RT_TABLE_MAIN;
	r.body.route.rtm_protocol = RTPROT_BOOT;
	r.body.route.rtm_scope = by ? RT_SCOPE_UNIVERSE : RT_SCOPE_LINK;
	r.body.route.rtm_type = RTN_UNICAST;
	r.body.route.rtm_flags = by ? RTNH_F_ONLINK : 0;
	if (to) {
		r.body.route.rtm_dst_len = 32;
		add(&r, RTA_DST, &to, 4);
	}
	add(&r, RTA_OIF, &index, 4);
	if (by)
		add(&r, RTA_GATEWAY, &by, 4);
	ask(nl, &r, "add route");
}

/* A pair of interfaces without ARP, so both ends have one hardware address. */
static void wire(int nl, int index, pid_t pid)
{
	REQUEST(r, RTM_NEWLINK, link, NLM_F_CREATE | NLM_F_EXCL);
	unsigned char hardware[6] = { 2, 0, index >> 24, index >> 16, index >> 8, index };
	int one = 1;
	char name[IFNAMSIZ];
	struct rtattr *info, *data, *peer;
	struct ifinfomsg *other;
	snprintf(name, sizeof name, "bare%d", index);
	r.body.link.ifi_index = index;
	r.body.link.ifi_flags = r.body.link.ifi_change = IFF_NOARP;
	add(&r, IFLA_IFNAME, name, strlen(name) + 1);
	add(&r, IFLA_ADDRESS, hardware, 6);
	add(&r, IFLA_NUM_TX_QUEUES, &one, 4);
	add(&r, IFLA_NUM_RX_QUEUES, &one, 4);
	info = add(&r, IFLA_LINKINFO, 0, 0);
	add(&r, IFLA_INFO_KIND, "veth", 4);
	data = add(&r, IFLA_INFO_DATA, 0, 0);
	peer = add(&r, VETH_INFO_PEER, 0, 0);
	other = (void *)((char *)&r + r.head.nlmsg_len);
	r.head.nlmsg_len += NLMSG_ALIGN(sizeof *other);
	other->ifi_index = OURS;
	other->ifi_flags = other->ifi_change = IFF_NOARP;
	add(&r, IFLA_IFNAME, "eth0", 5);
	add(&r, IFLA_ADDRESS, hardware, 6);
	add(&r, IFLA_NUM_TX_QUEUES, &one, 4);
	add(&r, IFLA_NUM_RX_QUEUES, &one, 4);
	add(&r, IFLA_NET_NS_PID, &pid, 4);
	end(&r, peer);
	end(&r, data);
	end(&r, info);
	ask(nl, &r, "make interfaces");
	raise_link(nl, index);
}

static int netlink(void)
{
	int nl = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	if (nl < 0)
		die("netlink");
	return nl;
}

static in_addr_t gateway(void)
{
	return htonl(0x0A000001); /* 10.0.0.1 */
}

static void mounted(const char *from, const char *to, const char *type, unsigned long flags, const char *options)
{
	if (mount(from, to, type, flags, options))
		die(to);
}

/* The new process, from its first instruction until it is PROGRAM. */
static void become(int talk, const char *place, in_addr_t me)
{
	static const char *devices[] = { "null", "zero", "full", "random", "urandom", "tty" };
	char *arguments[] = { (char *)program, NULL }, *environment[] = { "PORT=8080", NULL };
	char options[4 * PATH], from[64], to[2 * PATH], byte = 0;
	int nl, null;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (read(talk, &byte, 1) != 1)
		_exit(1);
	mounted(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
	mounted("tmpfs", place, "tmpfs", 0, "mode=755");
	if (chdir(place) || mkdir("upper", 0755) || mkdir("work", 0755) || mkdir("root", 0755))
		die(place);
	snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s/upper,workdir=%s/work,userxattr", root, place, place);
	snprintf(to, sizeof to, "%s/root", place);
	mounted("overlay", to, "overlay", 0, options);
	if (chdir(to))
		die(to);
	mounted("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mounted("tmpfs", "dev", "tmpfs", MS_NOSUID, "mode=755");
	for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
		snprintf(from, sizeof from, "/dev/%s", devices[i]);
		snprintf(to, sizeof to, "dev/%s", devices[i]);
		close(open(to, O_CREAT | O_WRONLY, 0666));
		mounted(from, to, NULL, MS_BIND, NULL);
	}
	if (syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
		die("pivot_root");
	nl = netlink();
	raise_link(nl, 1);
	raise_link(nl, OURS);
	address(nl, OURS, me);
	route(nl, OURS, 0, gateway());
	close(nl);
	if ((null = open("/dev/null", O_RDWR)) >= 0)
		for (int fd = 0; fd < 2; fd++)
			dup2(null, fd);
	if (write(talk, &byte, 1) != 1)
		_exit(1);
	execve(program, arguments, environment);
	die(program);
}

/* Asks until there is an answer, which ends the first half of a life. */
static int answers(in_addr_t a)
{
	static const char get[] = "GET / HTTP/1.1\r\nHost: bare\r\nConnection: close\r\n\r\n";
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(PORT), .sin_addr.s_addr = a };
	struct timespec pause = { 0, 300000 };
	char answer[4096];
	for (double late = now() + 5; now() < late; nanosleep(&pause, NULL)) {
		int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), n = -1;
		if (!connect(s, (void *)&to, sizeof to) && send(s, get, sizeof get - 1, MSG_NOSIGNAL) > 0)
			n = recv(s, answer, sizeof answer, 0);
		close(s);
		if (n > 0)
			return 1;
	}
	return 0;
}

static void life(int nl, int number)
{
	char place[PATH], file[64], group[2 * PATH], text[32], byte = 0;
	int talk[2], pidfd = -1, ok, index = FIRST + number;
	in_addr_t me = htonl(0x0A000000 + 2 + number % 0xFFFF00);
	double began = now(), took;
	long pid;
	struct clone_args how = {
		.flags = CLONE_PIDFD | CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP,
		.pidfd = (unsigned long)&pidfd,
		.exit_signal = SIGCHLD,
	};
	snprintf(place, sizeof place, "%s/%d", dir, number);
	if (mkdir(place, 0755) || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, talk))
		die(place);
	for (char **g = groups; *g; g++) {
		snprintf(group, sizeof group, "%s/%d", *g, number);
		if (mkdir(group, 0755))
			die(group);
		limit(group, "memory.limit_in_bytes", "67108864");
		limit(group, "memory.max", "67108864");
		limit(group, "pids.max", "512");
		limit(group, "cpu.cfs_quota_us", "200000");
		limit(group, "cpu.max", "200000 100000");
	}
	if ((pid = syscall(SYS_clone3, &how, sizeof how)) < 0)
		die("clone");
	if (pid == 0)
		become(talk[1], place, me);
	close(talk[1]);
	snprintf(text, sizeof text, "%ld", pid);
	for (char **g = groups; *g; g++) {
		snprintf(group, sizeof group, "%s/%d/cgroup.procs", *g, number);
		put(group, text);
	}
	for (int i = 0; i < 2; i++) {
		snprintf(file, sizeof file, "/proc/%ld/%s", pid, i ? "gid_map" : "uid_map");
		put(file, "0 0 65536");
	}
	wire(nl, index, pid);
	route(nl, index, me, 0);
	if (write(talk[0], &byte, 1) != 1 || read(talk[0], &byte, 1) != 1)
		die("the new process");
	settle(nl, index);
	ok = answers(me);
	took = now() - began;

	syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
	waitpid(pid, NULL, 0);
	close(pidfd);
	close(talk[0]);
	for (char **g = groups; *g; g++) {
		snprintf(group, sizeof group, "%s/%d", *g, number);
		for (int tries = 0; rmdir(group) && tries < 10000; tries++)
			usleep(100);
	}
	rmdir(place);
	pthread_mutex_lock(&out);
	if (ok)
		printf("%.0f\n", took * 1e6);
	else
		printf("-\n");
	pthread_mutex_unlock(&out);
}

static void *client(void *unused)
{
	int nl = netlink();
	while (now() < until)
		life(nl, __sync_fetch_and_add(&next, 1));
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t clients[64];
	int nl, n;
	if (argc < 7 || (n = atoi(argv[5])) < 1 || n > 64) {
		fprintf(stderr, "usage: bare PROGRAM ROOT DIR SECONDS CLIENTS GROUP...\n");
		return 2;
	}
	program = argv[1], root = argv[2], dir = argv[3], groups = argv + 6;
	nl = netlink();
	raise_link(nl, 1);
	address(nl, 1, gateway());
	until = now() + atof(argv[4]);
	for (int i = 0; i < n; i++)
		if (pthread_create(&clients[i], NULL, client, NULL))
			die("thread");
	for (int i = 0; i < n; i++)
		pthread_join(clients[i], NULL);
	return 0;
}
