/* An actor's end of the data plane, from one frame to the next, while calls are for experts that are at hand. Everything
   else goes back to Python: a call for other experts with its bytes, a frame that is no call before it is read.

   Called by experts/desk.py, one thread a connection, with structures that are also written down there and in
   experts/native_plane.py. */
#include "calls.h"
#include "frames.h"
#include "layer.h"
#include "memory.h"
#include "stream.h"

#include <errno.h>

/* The experts of one layer, by number; those that are not at hand have no weights. */
typedef struct {
    form gate_up, down;
    const expert *experts;
    int64_t num_experts;
} shelf;

/* What all connections of an actor share. */
typedef struct {
    pthread_mutex_t *lock; /* of who computes, who changes a shelf, and who reads the uses */
    int64_t level, is_narrow, num_layers;
    const shelf *shelves;  /* (components, layers) */
    uint32_t *uses;        /* of each call: shelf, rows, number of experts, and these */
    int64_t num_uses, most_uses;
    pthread_mutex_t *counting; /* guards the next three */
    int64_t num_active;        /* calls that are computed or wait for it, here or in Python */
    int64_t busy_ns, busy_since_ns; /* while there were any */
    run_in_threads *run;
    int64_t threads;
} desk;

/* Of one connection. */
typedef struct {
    uint64_t sequence;    /* of the last call */
    int64_t silence_ns;   /* how long a peer may pause in the middle of a frame */
    int64_t deadline_ns;  /* of the last call */
    uint8_t *call;        /* one for Python: header, maps, and from `tokens_at` on its activations; see sage_end_call */
    int64_t tokens_at;
    int64_t loss;         /* see stream.h */
} service;

/* SERVED goes on; the others are why it is Python's turn, as experts/desk.py has them too. */
enum turn { SERVED, NOTHING_CAME, LOST, OTHER_FRAME, CALL_FOR_PYTHON, OVERDUE };

/* A call with what is needed to compute it, in one piece of memory. */
typedef struct {
    frame_header header;
    uint8_t *begin, *maps, *tokens, *rows;
    int64_t *counts, *token_of;
    expert *experts;
} served;

static void cut_call(served *c, arena *a, const agreement *with) {
    const frame_header *h = &c->header;
    c->begin = cut(a, HEADER_BYTES);
    c->maps = cut(a, map_bytes(h));
    c->tokens = cut(a, (int64_t)h->num_tokens * with->row_bytes);
    c->rows = cut(a, (int64_t)h->num_rows * with->row_bytes);
    c->counts = cut(a, (int64_t)h->num_experts * (int64_t)sizeof *c->counts);
    c->token_of = cut(a, (int64_t)h->num_rows * (int64_t)sizeof *c->token_of);
    c->experts = cut(a, (int64_t)h->num_experts * (int64_t)sizeof *c->experts);
}

/* The rest of a call whose header is checked. */
static int receive_call(stream *s, const agreement *a, service *v, served *c) {
    arena memory = {0};
    cut_call(c, &memory, a);
    uint8_t *at = take_memory(memory.used);
    if (!at) {
        s->error = ENOMEM;
        return FAILED;
    }
    memory = (arena){.at = at};
    cut_call(c, &memory, a);
    memcpy(c->begin, &c->header, HEADER_BYTES);
    int loss = receive_rest(s, c->maps, map_bytes(&c->header), v->deadline_ns, v->silence_ns);
    if (!loss) loss = receive_rest(
        s, c->tokens, (int64_t)c->header.num_tokens * a->row_bytes, v->deadline_ns, v->silence_ns);
    if (loss) give_memory(at);
    return loss;
}

void sage_begin_work(desk *d) {
    pthread_mutex_lock(d->counting);
    if (!d->num_active++) d->busy_since_ns = now_ns();
    pthread_mutex_unlock(d->counting);
}

void sage_end_work(desk *d) {
    pthread_mutex_lock(d->counting);
    if (!--d->num_active) d->busy_ns += now_ns() - d->busy_since_ns;
    pthread_mutex_unlock(d->counting);
}

/* Under the lock: whether all experts are at hand, and there is room to say that they were used. */
static const shelf *find_experts(const desk *d, const served *c) {
    const frame_header *h = &c->header;
    if (h->layer >= d->num_layers || d->num_uses + 3 + h->num_experts > d->most_uses) return NULL;
    const shelf *found = &d->shelves[h->component * d->num_layers + h->layer];
    const uint32_t *numbers = (const uint32_t *)c->maps;
    for (int64_t i = 0; i < h->num_experts; i++) {
        if (numbers[i] >= found->num_experts || !found->experts[numbers[i]].gate_up.weights) return NULL;
        c->experts[i] = found->experts[numbers[i]];
    }
    return found;
}

static void note_use(desk *d, const served *c) {
    const frame_header *h = &c->header;
    uint32_t *use = d->uses + d->num_uses;
    use[0] = (uint32_t)(h->component * d->num_layers + h->layer), use[1] = h->num_rows, use[2] = h->num_experts;
    memcpy(use + 3, c->maps, 4 * (size_t)h->num_experts);
    d->num_uses += 3 + h->num_experts;
}

/* Whether the rows are computed, and counted. */
static bool compute_call(desk *d, const agreement *a, const served *c) {
    const frame_header *h = &c->header;
    if (!are_sound_maps(h, c->maps)) return false;
    const uint32_t *numbers = (const uint32_t *)c->maps;
    for (int64_t i = 0; i < h->num_experts; i++) c->counts[i] = numbers[h->num_experts + i];
    for (int64_t r = 0; r < h->num_rows; r++) c->token_of[r] = numbers[2 * h->num_experts + r];
    pthread_mutex_lock(d->lock);
    const shelf *found = find_experts(d, c);
    bool is_done = false;
    if (found) {
        const form forms[2] = {found->gate_up, found->down};
        is_done = !sage_multiply(
            (int)d->level, (int)d->is_narrow, true, &forms[0].kind, c->experts, h->num_experts, c->counts, c->token_of,
            c->tokens, h->num_tokens, a->row_bytes, c->rows, a->row_bytes, d->run, (unsigned)d->threads);
        if (is_done) note_use(d, c);
    }
    pthread_mutex_unlock(d->lock);
    return is_done;
}

static int answer(stream *s, const agreement *a, const service *v, const served *c) {
    frame_header header = new_header(a, ROWS_FRAME, v->sequence);
    const size_t bytes = (size_t)c->header.num_rows * a->row_bytes;
    header.num_rows = c->header.num_rows, header.body_bytes = (uint32_t)bytes;
    struct iovec parts[2] = {{&header, HEADER_BYTES}, {c->rows, bytes}};
    return send_frame(s, parts, 2, v->deadline_ns);
}

static enum turn serve_call(stream *s, desk *d, const agreement *a, service *v) {
    served call;
    memcpy(&call.header, s->ahead + s->taken, HEADER_BYTES);
    s->taken += HEADER_BYTES;
    v->sequence++;
    v->deadline_ns = now_ns() + (int64_t)call.header.deadline_us * 1000;
    if ((v->loss = receive_call(s, a, v, &call))) return LOST;
    sage_begin_work(d);
    const bool is_done = compute_call(d, a, &call);
    sage_end_work(d);
    if (!is_done) {
        v->call = call.begin, v->tokens_at = call.tokens - call.begin;
        return CALL_FOR_PYTHON;
    }
    const bool is_late = now_ns() >= v->deadline_ns;
    if (!is_late) v->loss = answer(s, a, v, &call);
    give_memory(call.begin);
    return is_late ? OVERDUE : v->loss ? LOST : SERVED;
}

/* Answers calls until it is Python's turn. An odd frame's header is left ahead, and its sequence number not counted. */
int sage_serve(stream *s, desk *d, const agreement *a, service *v) {
    enum turn turn = SERVED;
    v->call = NULL;
    while (turn == SERVED) {
        if ((v->loss = receive_ahead(s, HEADER_BYTES, FOREVER, 0))) return v->loss == SILENT ? NOTHING_CAME : LOST;
        frame_header header;
        memcpy(&header, s->ahead + s->taken, HEADER_BYTES);
        if (!memcmp(&header, a->heartbeat, HEADER_BYTES)) s->taken += HEADER_BYTES;
        else turn = may_begin_call(&header, a, v->sequence + 1) ? serve_call(s, d, a, v) : OTHER_FRAME;
        s->heard_at_ns = now_ns(); /* nobody listened meanwhile */
    }
    return turn;
}

void sage_end_call(uint8_t *call) { give_memory(call); }
