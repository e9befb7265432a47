/* A call of products of rows with each expert's matrices, or with one matrix: what the threads of a call share, and its
   pieces of work. */
#ifndef SAGE_CALLS_H
#define SAGE_CALLS_H

#include "work.h"

#define ROWS_PACKED 16 /* by one piece of work */

typedef struct {
    const uint8_t *weights; /* (outputs, inputs), rows back to back */
    const uint16_t *scales; /* bfloat16: int8 one an output, int4 (outputs, groups) */
} matrix;

typedef struct {
    int64_t kind, group, outputs, inputs;
} form;

typedef struct {
    matrix gate_up, down;
} expert;

/* What the threads of one call share. Phases: 0 packs x, 1 the first product, 2 the second one, of gated calls only. */
typedef struct {
    const level *level;
    form first, second;
    const way *first_way, *second_way;
    const expert *experts;
    int64_t num_experts;
    const int64_t *starts;      /* (experts + 1): where each one's rows begin */
    const int64_t *token_of;    /* row to token; NULL: row r is token r */
    const uint8_t *tokens;
    int64_t num_tokens, token_stride;
    bool is_narrow;             /* activations are bfloat16, else float32 */
    uint8_t *x, *hidden;        /* packed tokens; packed rows between both products */
    int64_t x_stride, hidden_stride;
    int64_t per_expert[3];      /* pieces, of phases 1 and 2 */
    int64_t panel;              /* outputs of a piece of the last product */
    int64_t row_runs;           /* pieces of a panel: of one small matrix for many rows several */
    uint8_t *out;
    int64_t out_stride;         /* bytes */
    const uint8_t *bias;        /* (outputs) in the activations' dtype, added to each row's rounded sums; or NULL */
    const uint8_t *added;       /* rows like out's, to which the rounded sums of the last product are added; or NULL */
    unsigned threads;           /* that take pieces, about as often */
    bool is_gated;
    bool is_widened;            /* out is float32, of sums that are rounded as the activations' dtype would */
} call;

/* From what the caller has set, the rest but for x and hidden, which need rows of x_stride and hidden_stride bytes. */
void plan_call(call *c);
int64_t first_pieces(const call *c);
int64_t last_pieces(const call *c);
void pack_tokens(const call *c, int64_t piece);
void gate_piece(const call *c, int64_t piece);
void product_piece(const call *c, int64_t piece);

/* See products.c. */
int sage_multiply(
    int level, int is_narrow, int is_gated, const int64_t *forms, const expert *experts, int64_t num_experts,
    const int64_t *counts, const int64_t *token_of, const void *tokens, int64_t num_tokens, int64_t token_stride,
    void *out, int64_t out_stride, run_in_threads *run, unsigned threads);

#endif
