/* An upstream much faster than any proxy: it answers as a node does, from constants.
 *
 * One thread, epoll. A POST whose body says "stream": true gets max_tokens events, `seed` milliseconds apart, each with
 * the clock's nanoseconds as its content, so that the receiver can tell how late it is; any other POST gets one JSON
 * answer. With `x-helexa-usage: 1` in the head, or include_usage in the body, a usage event follows. GETs get what the
 * routers ask of a node before they trust it.
 *
 *   stub PORT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BUF = 1 << 20, MAXFD = 16384 };

typedef struct {
    int fd, left, gap_ms, usage, streaming;
    uint64_t due;
    size_t n;
    char *in;
} conn;

static conn *conns[MAXFD];
static int active[MAXFD], n_active;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void put(conn *c, const char *data, size_t n) {
    while (n) { /* answers are small beside the socket's buffer: waiting is the exception */
        ssize_t sent = write(c->fd, data, n);
        if (sent > 0) { data += sent; n -= sent; }
        else if (sent < 0 && errno == EAGAIN) usleep(50);
        else return;
    }
}

static void put_event(conn *c, const char *json) {
    char out[1024];
    char event[900];
    int n = snprintf(event, sizeof event, "data: %s\n\n", json);
    int m = snprintf(out, sizeof out, "%x\r\n%s\r\n", n, event);
    put(c, out, m);
}

static void put_json(conn *c, const char *json) {
    char out[4096];
    int n = snprintf(out, sizeof out,
                     "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(json), json);
    put(c, out, n);
}

static void stop(conn *c) {
    for (int i = 0; i < n_active; i++)
        if (active[i] == c->fd) { active[i] = active[--n_active]; break; }
    c->streaming = 0;
}

/* One event; the end after the last. */
static void step(conn *c) {
    char json[512];
    if (c->left-- > 0) {
        snprintf(json, sizeof json,
                 "{\"id\":\"chatcmpl-stub\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"stub\","
                 "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"%llu\"},\"finish_reason\":null}]}",
                 (unsigned long long)now_ns());
        put_event(c, json);
        c->due += (uint64_t)c->gap_ms * 1000000u;
        return;
    }
    put_event(c, "{\"id\":\"chatcmpl-stub\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"stub\","
                 "\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}");
    if (c->usage)
        put_event(c, "{\"id\":\"chatcmpl-stub\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"stub\","
                     "\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":100,\"total_tokens\":109}}");
    put_event(c, "[DONE]");
    put(c, "0\r\n\r\n", 5);
    stop(c);
}

static long number_after(const char *body, const char *key, long otherwise) {
    const char *at = strstr(body, key);
    if (!at) return otherwise;
    at += strlen(key);
    while (*at == ' ' || *at == ':') at++;
    return strtol(at, NULL, 10);
}

static void answer(conn *c, char *head, char *body) {
    if (!strncmp(head, "GET ", 4)) {
        if (strstr(head, "/v1/models"))
            put_json(c, "{\"object\":\"list\",\"data\":[{\"id\":\"stub\",\"object\":\"model\",\"owned_by\":\"stub\",\"max_model_len\":32768}]}");
        else if (strstr(head, "GET /models ") )
            put_json(c, "[{\"id\":\"stub\",\"status\":\"loaded\",\"harness\":\"llama\",\"task\":\"chat\",\"devices\":[0],\"vram_used_mb\":100,"
                        "\"active_requests\":0,\"queued_requests\":0,\"limits\":{\"context\":32768,\"slots\":64}}]");
        else if (strstr(head, "GET /discovery "))
            put_json(c, "{\"hostname\":\"stub\",\"os\":\"linux\",\"kernel\":\"6\",\"devices\":[{\"index\":0,\"name\":\"CPU\",\"vram_total_mb\":24000}],\"harnesses\":[\"llama\"]}");
        else if (strstr(head, "GET /events "))
            put(c, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 47);
        else
            put_json(c, "{\"status\":\"ok\",\"uptime_secs\":5,\"devices\":[{\"index\":0,\"vram_free_mb\":23000}],\"model_path\":\"stub\",\"is_generation\":true}");
        return;
    }
    const char *stream = strstr(body, "\"stream\":");
    if (stream && !strncmp(stream + 9 + (stream[9] == ' '), "true", 4)) {
        c->left = number_after(body, "\"max_tokens\"", 100);
        c->gap_ms = number_after(body, "\"seed\"", 0);
        c->usage = strcasestr(head, "\r\nx-helexa-usage: 1") || strstr(body, "include_usage");
        static const char ok[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        put(c, ok, sizeof ok - 1);
        uint64_t now = now_ns(), gap = (uint64_t)c->gap_ms * 1000000u;
        c->due = gap && strstr(body, "\"user\":\"steps\"") ? (now / gap + 1) * gap : now + gap;
        c->streaming = 1;
        active[n_active++] = c->fd;
        return;
    }
    put_json(c, "{\"id\":\"chatcmpl-stub\",\"object\":\"chat.completion\",\"created\":1764000000,\"model\":\"stub\",\"choices\":[{\"index\":0,"
                "\"message\":{\"role\":\"assistant\",\"content\":\"Hello! How can I help you today?\"},\"finish_reason\":\"stop\"}],"
                "\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":9,\"total_tokens\":18}}");
}

static void drop(conn *c) {
    if (c->streaming) stop(c);
    close(c->fd);
    conns[c->fd] = NULL;
    free(c->in);
    free(c);
}

static void serve(conn *c) {
    for (;;) {
        ssize_t n = read(c->fd, c->in + c->n, BUF - 1 - c->n);
        if (n == 0 || (n < 0 && errno != EAGAIN)) { drop(c); return; }
        if (n < 0) return;
        c->n += n;
        c->in[c->n] = 0;
        char *end = strstr(c->in, "\r\n\r\n");
        if (!end) continue;
        size_t have = c->n - (end + 4 - c->in), want = 0;
        char first = end[4];
        end[2] = 0;
        char *length = strcasestr(c->in, "\r\ncontent-length:");
        int chunked = strcasestr(c->in, "\r\ntransfer-encoding:") != NULL;
        end[2] = '\r';
        (void)first;
        if (length) want = strtoul(length + 17, NULL, 10);
        if (chunked ? memcmp(c->in + c->n - 5, "0\r\n\r\n", 5) : have < want) continue;
        end[3] = 0;
        answer(c, c->in, end + 4);
        c->n = 0;
        return;
    }
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    int one = 1, ls = socket(AF_INET, SOCK_STREAM, 0), ep = epoll_create1(0);
    setsockopt(ls, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(ls, (void *)&a, sizeof a) || listen(ls, 4096)) { perror("stub"); return 1; }
    socklen_t alen = sizeof a;
    getsockname(ls, (void *)&a, &alen);
    printf("%d\n", ntohs(a.sin_port));
    fflush(stdout);
    fcntl(ls, F_SETFL, O_NONBLOCK);
    epoll_ctl(ep, EPOLL_CTL_ADD, ls, &(struct epoll_event){.events = EPOLLIN, .data.fd = ls});
    for (;;) {
        int wait = -1;
        uint64_t now = now_ns();
        for (int i = 0; i < n_active; i++) {
            conn *c = conns[active[i]];
            int ms = c->due > now ? (int)((c->due - now + 999999) / 1000000) : 0;
            if (wait < 0 || ms < wait) wait = ms;
        }
        struct epoll_event ev[256];
        int n = epoll_wait(ep, ev, 256, wait);
        for (int i = 0; i < n; i++) {
            if (ev[i].data.fd != ls) { if (conns[ev[i].data.fd]) serve(conns[ev[i].data.fd]); continue; }
            int fd;
            while ((fd = accept4(ls, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                conn *c = calloc(1, sizeof *c);
                c->fd = fd;
                c->in = malloc(BUF);
                conns[fd] = c;
                epoll_ctl(ep, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLIN, .data.fd = fd});
            }
        }
        now = now_ns();
        for (int i = n_active - 1; i >= 0; i--) {
            conn *c = conns[active[i]];
            if (c->due <= now) step(c);
        }
    }
}
