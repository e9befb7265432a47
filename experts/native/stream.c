/* Waiting for bytes and sending them. A reader looks for bytes for a while before it sleeps: waking takes a thread longer
   than a small frame travels (see TransportLimits.spin_s in experts/channel.py).

   Called by experts/channel.py, which has set the socket's send timeout to one tick, and by serve.c and exchange.c. */
#include "stream.h"
#include "work.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

#define SHORTEST_WAIT_NS 1000000 /* a socket timeout of zero would mean no timeout */

/* A lock that Python and this source both take. NULL where there is no memory. */
pthread_mutex_t *sage_new_lock(void) {
    pthread_mutex_t *lock = malloc(sizeof *lock);
    if (lock) pthread_mutex_init(lock, NULL);
    return lock;
}

int sage_take_lock(pthread_mutex_t *lock, int is_waiting) {
    return is_waiting ? pthread_mutex_lock(lock) : pthread_mutex_trylock(lock);
}

int sage_give_lock(pthread_mutex_t *lock) { return pthread_mutex_unlock(lock); }

void sage_free_lock(pthread_mutex_t *lock) {
    pthread_mutex_destroy(lock);
    free(lock);
}

/* Look for bytes again and again for a while. Returns 0 where none came, or the stream has ended or is broken. */
static int64_t look(stream *s, void *to, int64_t room, int64_t began) {
    if (s->waits_to_sleep) {
        s->waits_to_sleep--;
        return 0;
    }
    const bool is_busy = s->last_wait_ns <= s->spin_ns;
    const int64_t until = began + (is_busy ? s->spin_ns : MIN(s->spin_ns, s->brief_spin_ns));
    bool has_lost_core = false;
    for (int64_t looked = began, now; looked < until && !has_lost_core; looked = now) {
        const ssize_t count = recv((int)s->fd, to, (size_t)room, MSG_DONTWAIT);
        if (count >= 0) {
            s->num_fruitless = 0;
            return count;
        }
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return 0;
        now = now_ns();
        has_lost_core = now - looked >= s->lost_core_ns;
    }
    if (is_busy || has_lost_core) { /* else nobody has asked anything for a while */
        s->num_fruitless = MIN(s->num_fruitless + 1, s->most_doublings);
        s->waits_to_sleep = (INT64_C(1) << s->num_fruitless) - 1;
    }
    return 0;
}

/* Of the kernel's wait: it is set anew only where it changes, which is seldom. */
static int set_receive_wait(stream *s, int64_t left_ns) {
    const int64_t wait_ns = MIN(s->tick_ns, left_ns > SHORTEST_WAIT_NS ? left_ns : SHORTEST_WAIT_NS);
    if (wait_ns == s->receive_wait_ns) return 0;
    const struct timeval wait = {.tv_sec = wait_ns / 1000000000, .tv_usec = wait_ns % 1000000000 / 1000};
    if (setsockopt((int)s->fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait)) return errno;
    s->receive_wait_ns = wait_ns;
    return 0;
}

int64_t sage_receive(stream *s, void *to, int64_t room, int flags, int64_t deadline_ns) {
    const int64_t began = now_ns();
    int64_t count = s->spin_ns ? look(s, to, room, began) : 0;
    if (!count) {
        const int error = set_receive_wait(s, deadline_ns - began);
        if (error) return -error;
        count = recv((int)s->fd, to, (size_t)room, flags);
        if (count < 0) count = errno == EWOULDBLOCK || errno == EINTR ? -EAGAIN : -errno;
    }
    const int64_t now = now_ns();
    s->last_wait_ns = now - began;
    if (count > 0) s->heard_at_ns = now;
    return count;
}

/* As sage_receive; needed: how many bytes are waited for. *count: those that came, maybe none. */
static int receive_some(
    stream *s, void *to, int64_t room, int64_t needed, int flags, int64_t deadline_ns, int64_t silence_ns, int64_t *count
) {
    const int64_t got = sage_receive(s, to, room, flags, deadline_ns), now = now_ns();
    *count = got > 0 ? got : 0;
    if (got > 0) return now >= deadline_ns && got < needed ? LATE : FINE; /* or who sends byte by byte would never be */
    if (!got) return ENDED;
    if (got != -EAGAIN) {
        s->error = -got;
        return FAILED;
    }
    if (now >= deadline_ns) return LATE;
    return now - s->heard_at_ns >= silence_ns ? SILENT : FINE;
}

int receive_ahead(stream *s, int64_t bytes, int64_t deadline_ns, int64_t silence_ns) {
    if (s->taken == s->filled) s->taken = s->filled = 0;
    if (s->taken + bytes > s->room) {
        memmove(s->ahead, s->ahead + s->taken, (size_t)bytes_ahead(s));
        s->filled -= s->taken, s->taken = 0;
    }
    int loss = FINE;
    while (!loss && bytes_ahead(s) < bytes) {
        int64_t count;
        loss = receive_some(
            s, s->ahead + s->filled, s->room - s->filled, bytes - bytes_ahead(s), 0, deadline_ns, silence_ns, &count);
        s->filled += count;
    }
    return loss;
}

int receive_rest(stream *s, void *to, int64_t bytes, int64_t deadline_ns, int64_t silence_ns) {
    int64_t got = MIN(bytes, bytes_ahead(s));
    memcpy(to, s->ahead + s->taken, (size_t)got);
    s->taken += got;
    int loss = FINE;
    while (!loss && got < bytes) {
        int64_t count;
        loss = receive_some(
            s, (uint8_t *)to + got, bytes - got, bytes - got, MSG_WAITALL, deadline_ns, silence_ns, &count);
        got += count;
    }
    return loss == ENDED ? CUT : loss; /* in the middle of a frame */
}

static int send_parts(stream *s, struct iovec *parts, int count, int64_t deadline_ns) {
    for (int64_t moved_at = 0;;) {
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
        ssize_t sent = sendmsg((int)s->fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            s->error = errno;
            return FAILED;
        }
        const bool has_moved = sent > 0;
        for (; count && sent >= (ssize_t)parts->iov_len; parts++, count--) sent -= (ssize_t)parts->iov_len;
        if (!count) return FINE;
        if (sent > 0) {
            parts->iov_base = (uint8_t *)parts->iov_base + sent;
            parts->iov_len -= (size_t)sent;
        }
        const int64_t now = now_ns();
        if (has_moved || !moved_at) moved_at = now;
        if (now >= deadline_ns || now - moved_at >= s->stall_ns) return STALLED;
    }
}

int send_frame(stream *s, struct iovec *parts, int count, int64_t deadline_ns) {
    pthread_mutex_lock(s->sending);
    const int loss = send_parts(s, parts, count, deadline_ns);
    if (loss && s->fd >= 0) (void)shutdown((int)s->fd, SHUT_RDWR); /* before another thread's heartbeat is taken for the rest */
    pthread_mutex_unlock(s->sending);
    return loss;
}
