/* One connected socket that carries frames, as experts/channel.py has it: exact reads, whole writes. */
#ifndef SAGE_STREAM_H
#define SAGE_STREAM_H

#include <pthread.h>
#include <stdint.h>
#include <sys/uio.h>

#define FOREVER INT64_MAX

/* Why a stream carries no more, as experts/channel.py tells it. */
enum loss { FINE, ENDED, LATE, SILENT, STALLED, FAILED, CUT };

/* Clocks are monotonic, in nanoseconds. One thread at a time reads; any may send. Written down in experts/native_plane.py
   too. */
typedef struct {
    pthread_mutex_t *sending; /* of whoever sends a frame, here or in Python */
    uint8_t *ahead;           /* bytes [taken, filled) of it have arrived and were not asked for yet */
    int64_t room, taken, filled;
    int64_t fd;               /* -1 once it is closed, which only who reads does */
    int64_t tick_ns;          /* the longest wait in the kernel */
    int64_t stall_ns;         /* how long a peer may read nothing of what is sent to it */
    int64_t spin_ns, brief_spin_ns, lost_core_ns, most_doublings; /* see TransportLimits.spin_s */
    int64_t last_wait_ns, num_fruitless, waits_to_sleep;
    int64_t receive_wait_ns;  /* the kernel's, as it was set last */
    int64_t heard_at_ns;
    int64_t error;            /* errno behind FAILED */
} stream;

/* Waits at most one tick for bytes, at most until the deadline. Returns how many came, 0 at the stream's end, else a
   negative errno: -EAGAIN where there were none. flags: of recv, for the wait in the kernel. */
int64_t sage_receive(stream *s, void *to, int64_t room, int flags, int64_t deadline_ns);

/* Wait until so many bytes have arrived ahead, at most `room`; or take so many, those ahead first. Heard nothing for
   silence_ns, they say SILENT. */
int receive_ahead(stream *s, int64_t bytes, int64_t deadline_ns, int64_t silence_ns);
int receive_rest(stream *s, void *to, int64_t bytes, int64_t deadline_ns, int64_t silence_ns);

/* A whole frame, whose parts are changed on the way. Where it is not FINE, the frame is cut in two and the socket shut. */
int send_frame(stream *s, struct iovec *parts, int count, int64_t deadline_ns);

static inline int64_t bytes_ahead(const stream *s) { return s->filled - s->taken; }

#endif
