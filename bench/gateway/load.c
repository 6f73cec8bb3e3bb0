/* A light load generator: N connections, each with one request at a time, until `requests` have been answered.
 *
 *   load PORT PATH BODY_FILE CONNECTIONS REQUESTS [HEADER...]
 *
 * Prints one JSON object: requests, errors, seconds, latency and first-byte percentiles in microseconds, and for streams
 * the events and the percentiles of their delay (now - the nanoseconds in "content"). REQUESTS 0: open the connections,
 * send one request on each, print `ready`, and hold until standard input closes.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BUF = 1 << 16, MAXFD = 16384 };
typedef struct { int fd; long length; int head_done, chunked, status; uint64_t t0, first; size_t got; char tail[8]; int pending; } conn;

static conn conns[MAXFD];
static char *request;
static size_t request_n;
static float *latency, *first, *delay;
static long n_lat, n_first, n_delay, cap_delay = 1 << 22, started, done, errors, wanted, events;
static struct sockaddr_in addr;
static int ep;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static int cmp(const void *a, const void *b) { float x = *(const float *)a, y = *(const float *)b; return (x > y) - (x < y); }
static double pct(float *v, long n, double p) { if (!n) return -1; long i = (long)(p * (n - 1) + 0.5); return v[i]; }

static void dial(int slot);

static void ask(conn *c) {
    if (wanted && started >= wanted) return;
    started++;
    c->head_done = c->chunked = c->status = 0;
    c->length = -1;
    c->got = 0;
    c->first = 0;
    memset(c->tail, 0, sizeof c->tail);
    c->pending = 1;
    c->t0 = now_ns();
    const char *p = request;
    size_t n = request_n;
    while (n) {
        ssize_t s = write(c->fd, p, n);
        if (s > 0) { p += s; n -= s; }
        else if (s < 0 && errno == EAGAIN) usleep(20);
        else return;
    }
}

static void dial(int slot) {
    (void)slot;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&addr, sizeof addr)) { perror("connect"); exit(1); }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    conns[fd] = (conn){.fd = fd};
    epoll_ctl(ep, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLIN, .data.fd = fd});
    ask(&conns[fd]);
}

static void finished(conn *c) {
    latency[n_lat++] = (now_ns() - c->t0) / 1000.0;
    if (c->status != 200) errors++;
    done++;
    c->pending = 0;
    ask(c);
}

static void scan(conn *c, char *data, size_t n) {
    uint64_t now = 0;
    char *at = data, *end = data + n;
    while ((at = memmem(at, end - at, "\"content\":", 10))) {
        at += 10;
        if (at < end && *at == ' ') at++;
        if (at >= end || *at != '"' || at[1] < '0' || at[1] > '9') continue;
        uint64_t sent = strtoull(at + 1, NULL, 10);
        if (!now) now = now_ns();
        events++;
        if (n_delay < cap_delay && sent) delay[n_delay++] = (now - sent) / 1000.0;
    }
    (void)c;
}

static void hear(conn *c) {
    static char buf[BUF + 1];
    for (;;) {
        ssize_t n = read(c->fd, buf, BUF);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            int fd = c->fd;
            if (c->pending) { errors++; done++; }
            close(fd);
            if (!wanted || started < wanted) dial(fd);
            return;
        }
        buf[n] = 0;
        if (!c->first) { c->first = now_ns(); first[n_first++] = (c->first - c->t0) / 1000.0; }
        size_t body = 0;
        if (!c->head_done) { /* our proxies send a head in one piece */
            char *end = strstr(buf, "\r\n\r\n");
            if (!end) continue;
            c->head_done = 1;
            c->status = atoi(buf + 9);
            *end = 0;
            char *l = strcasestr(buf, "\r\ncontent-length:");
            c->chunked = strcasestr(buf, "\r\ntransfer-encoding:") != NULL;
            if (l) c->length = atol(l + 17);
            *end = '\r';
            body = end + 4 - buf;
        }
        size_t len = n - body;
        c->got += len;
        scan(c, buf + body, len);
        if (len >= 8) memcpy(c->tail, buf + n - 8, 8);
        else { memmove(c->tail, c->tail + len, 8 - len); memcpy(c->tail + 8 - len, buf + body, len); }
        if (c->chunked ? !memcmp(c->tail + 3, "0\r\n\r\n", 5) : c->length >= 0 && (long)c->got >= c->length) { finished(c); return; }
    }
}

int main(int argc, char **argv) {
    if (argc < 6) { fprintf(stderr, "load PORT PATH BODY_FILE CONNECTIONS REQUESTS [HEADER...]\n"); return 2; }
    int connections = atoi(argv[4]);
    wanted = atol(argv[5]);
    FILE *f = fopen(argv[3], "r");
    static char body[1 << 22];
    size_t n = fread(body, 1, sizeof body, f);
    request = malloc(n + 8192);
    int h = sprintf(request, "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nContent-Type: application/json\r\nAccept: */*\r\nUser-Agent: load\r\n", argv[2], argv[1]);
    for (int i = 6; i < argc; i++) h += sprintf(request + h, "%s\r\n", argv[i]);
    h += sprintf(request + h, "Content-Length: %zu\r\n\r\n", n);
    memcpy(request + h, body, n);
    request_n = h + n;
    addr = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    long cap = (wanted ? wanted : connections) + connections + 16;
    latency = malloc(cap * 2 * sizeof *latency);
    first = malloc(cap * 2 * sizeof *first);
    delay = malloc(cap_delay * sizeof *delay);
    ep = epoll_create1(0);
    uint64_t t0 = now_ns();
    for (int i = 0; i < connections; i++) dial(i);
    if (!wanted) {
        printf("ready\n");
        fflush(stdout);
        epoll_ctl(ep, EPOLL_CTL_ADD, 0, &(struct epoll_event){.events = EPOLLIN, .data.fd = 0});
    }
    while (!wanted || done < wanted) {
        struct epoll_event ev[256];
        int k = epoll_wait(ep, ev, 256, 30000);
        if (k == 0) { fprintf(stderr, "load: nothing for 30 s, %ld of %ld answered\n", done, wanted); break; }
        int leave = 0;
        for (int i = 0; i < k; i++) { if (ev[i].data.fd == 0) leave = 1; else hear(&conns[ev[i].data.fd]); }
        if (leave) break;
    }
    double s = (now_ns() - t0) / 1e9;
    qsort(latency, n_lat, sizeof *latency, cmp);
    qsort(first, n_first, sizeof *first, cmp);
    qsort(delay, n_delay, sizeof *delay, cmp);
    printf("{\"requests\":%ld,\"errors\":%ld,\"seconds\":%.4f,\"latency_p50_us\":%.1f,\"latency_p99_us\":%.1f,\"first_p50_us\":%.1f,"
           "\"events\":%ld,\"delay_p50_us\":%.1f,\"delay_p99_us\":%.1f}\n",
           done, errors, s, pct(latency, n_lat, .5), pct(latency, n_lat, .99), pct(first, n_first, .5), events, pct(delay, n_delay, .5), pct(delay, n_delay, .99));
    return 0;
}
