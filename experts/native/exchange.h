/* A layer's call to the actors that own its experts, and their rows. The structures are also written down in
   experts/native_plane.py. */
#ifndef SAGE_EXCHANGE_H
#define SAGE_EXCHANGE_H

#include "frames.h"
#include "stream.h"

#define SIZES 64 /* of answers: 2^(size - 1) to 2^size - 1 rows */

/* An actor, and the connection to it. */
typedef struct {
    stream *stream;
    const agreement *agreed;
    int64_t component;       /* as the actor numbers it */
    uint64_t sequence;       /* of the last call */
    const int64_t *usual_ns; /* (SIZES): what answers must not take longer than, as experts/call_times.py has it */
} peer;

/* What became of a peer's share of a call. */
enum errand_state { NOT_ASKED, ASKED, ANSWERED, PEER_LOST };

typedef struct {
    int64_t state, loss; /* of PEER_LOST: see stream.h */
    int64_t num_rows, num_experts;
    int64_t asked_ns, deadline_ns;    /* clock before it was sent, and until when it must be answered */
    int64_t waited_ns, answered_ns;   /* for the answer, and clock at its end */
} errand;

/* What the calls of a step share. */
typedef struct {
    peer *peers;             /* in the order in which whoever asks several of them holds them */
    int64_t num_peers;
    const uint8_t *trace;
    int64_t trace_bytes;
    int64_t silence_ns;      /* how long a peer may pause in the middle of a frame */
    int64_t patience_ns;     /* after so long without an answer it is Python that waits */
    int64_t longest_ns, floor_ns, expert_ns; /* bounds of a deadline: at most, at least, and so much longer an expert */
    int64_t num_done;        /* layers whose rows are all there */
} exchange;

/* A call as sage_dispatch leaves it. */
typedef struct {
    int64_t layer;           /* as frames number it */
    const uint8_t *owners;   /* by expert: which peer */
    const uint32_t *maps;    /* the experts in use, ascending, rows of each, and each row's token */
    int64_t num_experts, num_rows, num_tokens;
    const uint8_t *tokens;   /* (num_tokens, row_bytes) */
    int64_t row_bytes;
} question;

/* Bytes that `ask_peers` needs besides. */
int64_t asking_bytes(const exchange *x, int64_t num_experts, int64_t num_rows, int64_t num_tokens, int64_t row_bytes);

/* Send every owner its share, and take all rows, (num_rows, row_bytes) in the call's order. errands: one a peer.
   Returns whether all are there, and finite; where not, the errands say what is left to do. */
bool ask_peers(exchange *x, const question *q, bool is_narrow, uint8_t *rows, errand *errands, void *memory);

#endif
