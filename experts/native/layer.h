/* A decoder layer as it is computed in two calls, and a step of its rows. The structures are also written down in
   router/native_structures.py. */
#ifndef SAGE_LAYER_H
#define SAGE_LAYER_H

#include "attention.h"
#include "calls.h"

typedef struct {
    form form;
    matrix matrix;
} linear;

/* What a layer has. Norms and biases are in the rows' dtype; what it may lack is NULL: q_norm and k_norm, biases, and the
   matrices of the expert that every row passes. A layer without experts has no gates: every row passes that one alone. */
typedef struct {
    const uint8_t *input_norm, *q_norm, *k_norm, *post_norm, *qkv_bias, *output_bias;
    linear qkv, output, gate, shared_gate;
    form gate_up, down, shared_gate_up, shared_down;
    const expert *experts; /* all of them */
    expert shared;
} layer;

/* What all layers of a step share. */
typedef struct {
    int64_t level, is_narrow, width, heads, kv_heads, head_width, has_wide_norms, num_experts, top_k, is_normalised;
    int64_t num_tokens, num_spans, most_blocks, block_bytes, layer_bytes;
    const float *cos, *sin;
    uint8_t *keys, *values;
    const int64_t *blocks, *offsets, *tables;
    const span *spans;
    int64_t *ended_ns; /* (PHASES), of a run of layers (layers, 2 halves, PHASES): when each phase ended; or NULL */
    float eps, scale, bound;
} step;

/* Memory that a call needs at once, cut into parts. */
typedef struct {
    uint8_t *at;
    size_t used;
} arena;

void *cut(arena *a, int64_t bytes);

/* What halves are made of; pieces have ROWS_PACKED rows each. Memory is of a thread, in bytes. */
int64_t packing_pieces(const step *s);
size_t norm_memory(const step *s);
size_t routing_memory(const step *s);
size_t mixing_memory(const step *s);

/* A product of all rows with one matrix. one: room for the matrix; starts: for two numbers. */
call one_product(const step *s, const linear *l, unsigned threads, expert *one, int64_t *starts);

#define MOST_PACKED 3

/* Normed rows as up to MOST_PACKED calls want them, of which the first is there and the others may be NULL. kept: where they
   are left too, or NULL. */
void pack_normed(
    const step *s, const uint8_t *hidden, const uint8_t *norm, const call *const calls[MOST_PACKED], uint8_t *kept,
    int64_t piece, float *memory);

/* From the gate's logits to each row's experts, best first, and their weights. */
void route_rows(const step *s, const call *gate, int64_t *chosen, float *weights, int64_t piece, float *memory);

/* What is added to the rows of a layer: (tokens, top_k) rows of experts, each with a weight, and where there is one, a row of
   the expert that every row passes, scaled by its gate. */
typedef struct {
    const uint8_t *rows;         /* of all experts */
    const int64_t *row_of;       /* (tokens, top_k): which of them is a slot's */
    const float *weights;        /* (tokens, top_k) */
    const uint8_t *shared_gates; /* (tokens, 1); or NULL */
    const uint8_t *shared_rows;  /* (tokens, width) */
} mixture;

/* hidden + each row's experts by rank + the one that every row passes. */
void combine_rows(
    const step *s, const uint8_t *hidden, const mixture *m, uint8_t *out, int64_t piece, float *memory);

int sage_attention_half(
    const step *s, const layer *l, int64_t index, int64_t window, const void *hidden, void *out, run_in_threads *run,
    unsigned threads);
int sage_experts_half(
    const step *s, const layer *l, const void *hidden, void *out, int64_t *chosen, float *weights, int64_t *used,
    int64_t *num_used, run_in_threads *run, unsigned threads);

/* See dense.c. */
int sage_dense_half(
    const step *s, const layer *l, const void *hidden, void *out, run_in_threads *run, unsigned threads);

/* A call, and where its rows belong. */
typedef struct {
    uint8_t *normed;     /* (tokens, width) rows in the model's dtype: the gate's input, and the experts' */
    int64_t *chosen;     /* (tokens, top_k), best first */
    float *weights;      /* the same, of these */
    int64_t *row_of;     /* the same: the call's row */
    uint32_t *maps;      /* as a frame has them: the experts in use, ascending, rows of each, and each row's token */
    int64_t *num_used;   /* experts */
    uint8_t *shared_gates, *shared_rows; /* as of a mixture; NULL where no layer of the step has such an expert */
} dispatched;

/* See layer.c. */
int sage_run_half(void *half, int64_t until_ns, run_in_threads *run, unsigned threads);
void sage_end_half(void *half);

/* See dispatch.c. */
int sage_dispatch(
    const step *s, const layer *l, const void *hidden, const dispatched *to, run_in_threads *run, unsigned threads);
int sage_combine(
    const step *s, const void *hidden, const void *rows, const dispatched *of, void *out, run_in_threads *run,
    unsigned threads);
int sage_are_finite(int is_narrow, const void *values, int64_t count);

#endif
