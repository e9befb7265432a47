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

/* What a layer has. Norms are in the rows' dtype; q_norm and k_norm may be NULL. */
typedef struct {
    const uint8_t *input_norm, *q_norm, *k_norm, *post_norm;
    linear qkv, output, gate;
    form gate_up, down;
    const expert *experts; /* all of them */
} layer;

/* What all layers of a step share. */
typedef struct {
    int64_t level, is_narrow, width, heads, kv_heads, head_width, num_experts, top_k, is_normalised;
    int64_t num_tokens, num_spans, most_blocks, block_bytes, layer_bytes;
    const float *cos, *sin;
    uint8_t *keys, *values;
    const int64_t *blocks, *offsets, *tables;
    const span *spans;
    int64_t *ended_ns; /* (PHASES), of a run of layers (layers, 2 halves, PHASES): when each phase ended; or NULL */
    float eps, scale;
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

/* Normed rows as the first product wants them, and the second, if any. kept: where they are left too, or NULL. */
void pack_normed(
    const step *s, const uint8_t *hidden, const uint8_t *norm, const call *first, const call *second, uint8_t *kept,
    int64_t piece, float *memory);

/* From the gate's logits to each row's experts, best first, and their weights. */
void route_rows(const step *s, const call *gate, int64_t *chosen, float *weights, int64_t piece, float *memory);

/* Each row's experts by rank, added to the row. rows: of all experts; row_of: which of them is a slot's. */
void combine_rows(
    const step *s, const uint8_t *hidden, const uint8_t *rows, const int64_t *row_of, const float *weights, uint8_t *out,
    int64_t piece, float *memory);

int sage_attention_half(
    const step *s, const layer *l, int64_t index, int64_t window, const void *hidden, void *out, run_in_threads *run,
    unsigned threads);
int sage_experts_half(
    const step *s, const layer *l, const void *hidden, void *out, int64_t *chosen, float *weights, int64_t *used,
    int64_t *num_used, run_in_threads *run, unsigned threads);

/* A call, and where its rows belong. */
typedef struct {
    uint8_t *normed;     /* (tokens, width) rows in the model's dtype: the gate's input, and the experts' */
    int64_t *chosen;     /* (tokens, top_k), best first */
    float *weights;      /* the same, of these */
    int64_t *row_of;     /* the same: the call's row */
    uint32_t *maps;      /* as a frame has them: the experts in use, ascending, rows of each, and each row's token */
    int64_t *num_used;   /* experts */
} dispatched;

/* See layer.c. */
int sage_run_half(void *half, int64_t until_ns, run_in_threads *run, unsigned threads);
void sage_end_half(void *half);

/* See dispatch.c. */
int sage_dispatch(
    const step *s, const layer *l, const void *hidden, const dispatched *to, run_in_threads *run, unsigned threads);
int sage_combine(
    const step *s, const void *hidden, const void *rows, const int64_t *row_of, const float *weights, void *out,
    run_in_threads *run, unsigned threads);
int sage_are_finite(int is_narrow, const void *values, int64_t count);

#endif
