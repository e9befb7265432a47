/* From a call to the actors' rows: cut by owner as experts/shares.py cuts it, sent, heard. Whatever is not the one right
   answer that comes soon is left to Python: nothing of it is taken from the stream, but for rows that end in their middle.

   Called by asked.c. */
#include "exchange.h"
#include "layer.h"

/* Of one peer. */
typedef struct {
    const uint32_t *maps;
    const uint8_t *tokens;
    int64_t num_experts, num_rows, num_tokens;
} share;

static int64_t maps_bytes(int64_t num_experts, int64_t num_rows) {
    return UP_TO(4 * (2 * num_experts + num_rows), 64);
}

int64_t asking_bytes(const exchange *x, int64_t num_experts, int64_t num_rows, int64_t num_tokens, int64_t row_bytes) {
    const int64_t share_bytes = UP_TO((int64_t)sizeof(share), 64) + UP_TO(num_tokens * row_bytes, 64);
    const int64_t a_peer = share_bytes + maps_bytes(num_experts, num_rows);
    return x->num_peers * a_peer + UP_TO(4 * num_tokens, 64);
}

/* The experts of one peer, their rows, and the tokens that these need, numbered anew. place: room for all tokens. */
static share cut_share(const question *q, int64_t owner, uint32_t *place, uint32_t *maps, uint8_t *tokens) {
    const uint32_t *counts = q->maps + q->num_experts, *token_of = counts + q->num_experts;
    share to = {.maps = maps, .tokens = tokens};
    for (int64_t i = 0; i < q->num_experts; i++)
        if (q->owners[q->maps[i]] == owner) maps[to.num_experts++] = q->maps[i];
    uint32_t *to_counts = maps + to.num_experts, *to_tokens = to_counts + to.num_experts;
    memset(place, 0, 4 * (size_t)q->num_tokens);
    for (int64_t i = 0, row = 0; i < q->num_experts; row += counts[i++]) {
        if (q->owners[q->maps[i]] != owner) continue;
        *to_counts++ = counts[i];
        for (int64_t r = row; r < row + counts[i]; r++) place[to_tokens[to.num_rows++] = token_of[r]] = 1;
    }
    for (int64_t t = 0; t < q->num_tokens; t++) {
        if (!place[t]) continue;
        memcpy(tokens + to.num_tokens * q->row_bytes, q->tokens + t * q->row_bytes, (size_t)q->row_bytes);
        place[t] = (uint32_t)to.num_tokens++;
    }
    for (int64_t r = 0; r < to.num_rows; r++) to_tokens[r] = place[to_tokens[r]];
    return to;
}

/* Who is asked for what. A peer that owns all of the call's experts takes it as it is. */
static void cut_shares(const exchange *x, const question *q, share *shares, arena *memory) {
    uint32_t *place = cut(memory, 4 * q->num_tokens);
    const uint8_t first = q->owners[q->maps[0]];
    bool is_one = true;
    for (int64_t i = 1; i < q->num_experts && is_one; i++) is_one = q->owners[q->maps[i]] == first;
    for (int64_t p = 0; p < x->num_peers; p++) {
        uint32_t *maps = cut(memory, maps_bytes(q->num_experts, q->num_rows));
        uint8_t *tokens = cut(memory, q->num_tokens * q->row_bytes);
        if (!is_one) shares[p] = cut_share(q, p, place, maps, tokens);
        else if (p != first) shares[p] = (share){0};
        else shares[p] = (share){q->maps, q->tokens, q->num_experts, q->num_rows, q->num_tokens};
    }
}

static int size_of(int64_t num_rows) { return 64 - __builtin_clzll((uint64_t)num_rows); }

/* How long an answer may take, as experts/call_times.py has it. */
static int64_t timeout_of(const exchange *x, const peer *p, const share *s) {
    const int64_t usual = p->usual_ns[size_of(s->num_rows)], least = x->floor_ns + x->expert_ns * s->num_experts;
    return MIN(x->longest_ns, usual > least ? usual : least);
}

static void ask(exchange *x, const question *q, peer *p, share *s, errand *e) {
    *e = (errand){.num_rows = s->num_rows, .num_experts = s->num_experts, .asked_ns = now_ns()};
    const int64_t timeout = timeout_of(x, p, s), timeout_us = timeout / 1000;
    e->deadline_ns = timeout < FOREVER - e->asked_ns ? e->asked_ns + timeout : FOREVER;
    frame_header header = new_header(p->agreed, CALL_FRAME, p->sequence + 1);
    header.trace_bytes = (uint8_t)x->trace_bytes, header.component = (uint16_t)p->component;
    header.layer = (uint32_t)q->layer, header.deadline_us = (uint32_t)MIN(timeout_us > 0 ? timeout_us : 1, UINT32_MAX);
    header.num_tokens = (uint32_t)s->num_tokens, header.num_rows = (uint32_t)s->num_rows;
    header.num_experts = (uint32_t)s->num_experts;
    const int64_t maps = map_bytes(&header) - x->trace_bytes, activations = s->num_tokens * q->row_bytes;
    header.body_bytes = (uint32_t)(map_bytes(&header) + activations);
    struct iovec parts[4] = {
        {&header, HEADER_BYTES}, {(void *)s->maps, (size_t)maps}, {(void *)x->trace, (size_t)x->trace_bytes},
        {(void *)s->tokens, (size_t)activations},
    };
    p->sequence++;
    e->loss = send_frame(p->stream, parts, 4, e->deadline_ns);
    e->state = e->loss ? PEER_LOST : ASKED;
}

/* Past heartbeats. Returns whether the right header has come, and is taken. */
static bool hear_header(const exchange *x, const peer *p, errand *e, int64_t began) {
    frame_header expected = new_header(p->agreed, ROWS_FRAME, p->sequence), header;
    expected.num_rows = (uint32_t)e->num_rows, expected.body_bytes = (uint32_t)(e->num_rows * p->agreed->row_bytes);
    stream *s = p->stream;
    s->heard_at_ns = began; /* nobody listened before */
    while (now_ns() - began < x->patience_ns) {
        const int loss = receive_ahead(s, HEADER_BYTES, e->deadline_ns, x->patience_ns);
        if (loss == ENDED || loss == FAILED) e->state = PEER_LOST, e->loss = bytes_ahead(s) && loss == ENDED ? CUT : loss;
        if (loss) return false;
        memcpy(&header, s->ahead + s->taken, HEADER_BYTES);
        const bool is_right = !memcmp(&header, &expected, HEADER_BYTES);
        if (!is_right && memcmp(&header, p->agreed->heartbeat, HEADER_BYTES)) return false;
        s->taken += HEADER_BYTES;
        if (is_right) return true;
    }
    return false;
}

/* The rows of a peer's experts, each expert's where the call has them. Returns a loss. */
static int hear_rows(const exchange *x, const question *q, int64_t p, const errand *e, uint8_t *rows) {
    const uint32_t *counts = q->maps + q->num_experts;
    int loss = FINE;
    for (int64_t i = 0, begin = 0, row = 0; i < q->num_experts && !loss; i++) {
        const bool is_here = q->owners[q->maps[i]] == p;
        if (!is_here) begin = row + counts[i];
        row += counts[i];
        const bool goes_on = i + 1 < q->num_experts && q->owners[q->maps[i + 1]] == p;
        if (!is_here || goes_on) continue;
        loss = receive_rest(
            x->peers[p].stream, rows + begin * q->row_bytes, (row - begin) * q->row_bytes, e->deadline_ns, x->silence_ns);
    }
    return loss;
}

static bool hear(exchange *x, const question *q, int64_t p, errand *e, uint8_t *rows) {
    const int64_t began = now_ns(), soonest = began + x->patience_ns;
    if (e->deadline_ns < soonest) e->deadline_ns = soonest; /* an answer that came in time may lie there unread */
    if (hear_header(x, &x->peers[p], e, began)) {
        e->loss = hear_rows(x, q, p, e, rows);
        e->state = e->loss ? PEER_LOST : ANSWERED;
    }
    e->answered_ns = now_ns();
    e->waited_ns = e->answered_ns - began;
    return e->state == ANSWERED;
}

bool ask_peers(exchange *x, const question *q, bool is_narrow, uint8_t *rows, errand *errands, void *at) {
    arena memory = {.at = at};
    share *shares = cut(&memory, x->num_peers * (int64_t)sizeof *shares);
    cut_shares(x, q, shares, &memory);
    memset(errands, 0, (size_t)x->num_peers * sizeof *errands);
    bool is_well = true;
    for (int64_t p = 0; p < x->num_peers && is_well; p++) {
        if (!shares[p].num_experts) continue;
        ask(x, q, &x->peers[p], &shares[p], &errands[p]);
        is_well = errands[p].state == ASKED;
    }
    for (int64_t p = 0; p < x->num_peers && is_well; p++)
        is_well = errands[p].state == NOT_ASKED || hear(x, q, p, &errands[p], rows);
    return is_well && sage_are_finite(is_narrow, rows, q->num_rows * q->row_bytes / (is_narrow ? 2 : 4));
}
