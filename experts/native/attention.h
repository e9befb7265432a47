/* Attention of a step's rows, whose keys and values are written to the cache: what threads share, and pieces of work. */
#ifndef SAGE_ATTENTION_H
#define SAGE_ATTENTION_H

#include "work.h"

typedef struct {
    int64_t first_row, count, table_start, first_position; /* rows of the step, and where the sequence's blocks stand */
} span;

/* What the threads share. Phases: some tokens a piece (place_tokens), then runs of query rows (attend_piece). */
typedef struct {
    const level *level;
    const block_way *way;
    bool is_narrow;
    bool has_wide_norms;        /* over all of a token's queries, or keys, and not by head */
    int64_t num_tokens, heads, kv_heads, width, window, num_spans, block_bytes, most_blocks;
    const uint8_t *qkv, *q_norm, *k_norm;
    const float *cos, *sin;
    float eps, scale;
    float bound;                /* of the absolute values of queries, keys and values; 0 for none */
    uint8_t *keys, *values;
    const int64_t *blocks, *offsets, *tables;
    const span *spans;
    const int64_t *span_pieces; /* (spans + 1): pieces before each */
    uint8_t *q;                 /* (tokens * heads), as the way takes them */
    int64_t q_stride;           /* bytes */
    uint8_t *out;
} attention;

/* From what the caller has set, the way and q_stride; (spans + 1) numbers of pieces go to span_pieces. */
void plan_attention(attention *a, int64_t *span_pieces);
size_t attention_memory(const attention *a); /* bytes that a thread needs for its pieces */
int64_t placing_pieces(const attention *a);
void place_tokens(const attention *a, int64_t piece, float *memory);
void attend_piece(const attention *a, int64_t piece, float *memory);
void norm_row(
    const level *level, bool is_narrow, float *x, const uint8_t *weight, float *memory, float eps, int64_t count);

#endif
