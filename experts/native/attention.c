/* Attention over blocks of cached keys and values, and norms. A row's bits depend on its query and on the keys and values
   that it sees: scores by the tiles of products.c, the largest of them, weights, then value after value, block after block.
   Blocks that a row does not see would add zeros, so leaving them out changes nothing. All of it in float32.

   Called by router/native_attention.py, which has checked pointers, shapes, block numbers and limits. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>

#define ROWS_NORMED 32
#define TOKENS_PLACED 8 /* by one piece: neighbours lie in the same cache lines, where blocks are packed */
#define ROWS_OF_A_PIECE 96 /* that share a key-value head; a block is packed, or read, once for all of them */

/* memory: room for the weights, which are in the rows' dtype. */
void norm_row(
    const level *level, bool is_narrow, float *x, const uint8_t *weight, float *memory, float eps, int64_t count
) {
    const float mean = level->square_sum(x, count) / (float)count;
    level->read_row(is_narrow, weight, memory, count);
    level->scale(x, memory, 1.0f / sqrtf(mean + eps), count, is_narrow);
}

/* A head's row to its place in a block. */
static void place(const attention *a, place_head *place_packed, const uint8_t *row, int64_t position, uint8_t *block) {
    const int64_t bytes = a->width * (a->is_narrow ? 2 : 4);
    if (place_packed) place_packed(row, a->width, position, block);
    else memcpy(block + position * bytes, row, (size_t)bytes);
}

/* What is no number stays so. */
static void bound_values(float *x, float bound, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] = x[i] > bound ? bound : x[i] < -bound ? -bound : x[i];
}

/* Some heads of a token that have a norm together, or one, as they are rotated. norm: NULL for none. memory: the same size
   as x. */
static void read_heads(
    const attention *a, const uint8_t *row, const uint8_t *norm, int64_t heads, float *x, float *memory
) {
    const int64_t count = heads * a->width;
    a->level->read_row(a->is_narrow, row, x, count);
    if (norm) norm_row(a->level, a->is_narrow, x, norm, memory, a->eps, count);
    if (a->bound > 0) bound_values(x, a->bound, count);
}

static int64_t heads_normed(const attention *a, int64_t heads) { return a->has_wide_norms ? heads : 1; }

/* In floats: heads that have a norm together, the norm, a head that was turned, and one as it is stored. */
static int64_t placing_memory(const attention *a) {
    return 2 * (heads_normed(a, MAX(a->heads, a->kv_heads)) + 1) * a->width;
}

/* One token's heads: norm, bound, rotation; keys and values go to the cache. */
static void place_token(const attention *a, int64_t t, float *x) {
    float *turned = x + placing_memory(a) - 2 * a->width, *memory = x + (turned - x) / 2;
    uint8_t *stored = (uint8_t *)(turned + a->width);
    const int64_t item = a->is_narrow ? 2 : 4, width = a->width;
    const uint8_t *row = a->qkv + t * (a->heads + 2 * a->kv_heads) * width * item;
    const float *cos = a->cos + t * width, *sin = a->sin + t * width;
    for (int64_t h = 0, together = heads_normed(a, a->heads); h < a->heads; h++) {
        if (h % together == 0) read_heads(a, row + h * width * item, a->q_norm, together, x, memory);
        a->level->rotate(x + h % together * width, cos, sin, turned, width);
        a->level->store_row(a->way->item == 2, turned, a->q + (t * a->heads + h) * a->q_stride, width);
    }
    row += a->heads * width * item;
    for (int64_t h = 0, together = heads_normed(a, a->kv_heads); h < a->kv_heads; h++) {
        if (h % together == 0) read_heads(a, row + h * width * item, a->k_norm, together, x, memory);
        a->level->rotate(x + h % together * width, cos, sin, turned, width);
        a->level->store_row(a->is_narrow, turned, stored, width);
        const int64_t at = a->blocks[t] * a->block_bytes + h * BLOCK * width * item;
        place(a, a->way->place_key, stored, a->offsets[t], a->keys + at);
    }
    row += a->kv_heads * width * item;
    for (int64_t h = 0; h < a->kv_heads; h++) {
        const uint8_t *value = row + h * width * item;
        if (a->bound > 0) {
            read_heads(a, value, NULL, 1, x, memory);
            a->level->store_row(a->is_narrow, x, stored, width);
            value = stored;
        }
        const int64_t at = a->blocks[t] * a->block_bytes + h * BLOCK * width * item;
        place(a, a->way->place_value, value, a->offsets[t], a->values + at);
    }
}

void place_tokens(const attention *a, int64_t piece, float *memory) {
    const int64_t end = MIN(a->num_tokens, (piece + 1) * TOKENS_PLACED);
    for (int64_t t = piece * TOKENS_PLACED; t < end; t++) place_token(a, t, memory);
}

int64_t placing_pieces(const attention *a) { return (a->num_tokens + TOKENS_PLACED - 1) / TOKENS_PLACED; }

/* A thread's memory for a piece. */
typedef struct {
    uint8_t *keys, *values; /* of a block, packed */
    float *out, *largest, *totals;
} piece_memory;

static int64_t padded_width(const attention *a) { return UP_TO(a->width, BLOCK_UNIT); }

static piece_memory cut_memory(const attention *a, float *memory) {
    const int64_t block_bytes = padded_width(a) * BLOCK * a->way->item;
    piece_memory m = {.keys = (uint8_t *)memory, .values = (uint8_t *)memory + block_bytes};
    m.out = (float *)(m.values + block_bytes);
    m.largest = m.out + ROWS_OF_A_PIECE * padded_width(a);
    m.totals = m.largest + ROWS_OF_A_PIECE;
    return m;
}

size_t attention_memory(const attention *a) {
    const int64_t state = ROWS_OF_A_PIECE * (padded_width(a) + 2) * (int64_t)sizeof(float);
    const int64_t attending = 2 * padded_width(a) * BLOCK * a->way->item + state;
    return (size_t)MAX(attending, placing_memory(a) * (int64_t)sizeof(float));
}

/* Query rows of one span that share a key-value head, from `first` on; row r is a head of token r / shared. */
typedef struct {
    const span *span;
    int64_t kv, first, rows;
} run;

static int64_t token_of(const attention *a, const run *p, int64_t r) {
    return (p->first + r) / (a->heads / a->kv_heads);
}

/* (token, head) of a row, as q and out have them. */
static int64_t place_of(const attention *a, const run *p, int64_t r) {
    const int64_t shared = a->heads / a->kv_heads;
    return (p->span->first_row + token_of(a, p, r)) * a->heads + p->kv * shared + (p->first + r) % shared;
}

static int64_t end_of(const attention *a, const run *p, int64_t r) {
    return p->span->first_position + token_of(a, p, r) + 1;
}

static int64_t begin_of(const attention *a, int64_t end) { return a->window && end > a->window ? end - a->window : 0; }

static int64_t within_block(int64_t position, int64_t block) {
    position -= block * BLOCK;
    return position < 0 ? 0 : MIN(position, BLOCK);
}

/* A block, packed, for those of the run's rows that see any of it. */
static void attend_to_block(
    const attention *a, const run *p, int64_t block, const uint8_t *keys, const uint8_t *values, const piece_memory *m
) {
    block_tile t = {
        .keys = keys, .values = values, .width = a->width, .factor = a->scale * 1.44269504f,
        .stride = padded_width(a),
    };
    for (int64_t r = 0; r < p->rows;) {
        const int rows = next_rows(p->rows - r, a->way->most_rows);
        for (int i = 0; i < rows; i++) {
            const int64_t end = end_of(a, p, r + i);
            t.q[i] = a->q + place_of(a, p, r + i) * a->q_stride;
            t.from[i] = within_block(begin_of(a, end), block), t.to[i] = within_block(end, block);
        }
        t.out = m->out + r * t.stride, t.largest = m->largest + r, t.totals = m->totals + r;
        if (t.to[rows - 1] > t.from[0]) a->way->attend(rows, &t);
        r += rows;
    }
}

/* Of the run's key-value head, in bytes. */
static int64_t place_of_block(const attention *a, const run *p, int64_t block) {
    const int64_t item = a->is_narrow ? 2 : 4;
    return a->tables[p->span->table_start + block] * a->block_bytes + p->kv * BLOCK * a->width * item;
}

/* Blocks lie anywhere in the cache, and few rows are done with one before the next has come. */
static void ask_for_block(const attention *a, int64_t at) {
    const int64_t bytes = BLOCK * a->width * (a->is_narrow ? 2 : 4);
    ask_for(a->keys + at, bytes);
    ask_for(a->values + at, bytes);
}

/* soon: the place of the block that is needed after the run's last one. */
static void attend_run(const attention *a, const run *p, const piece_memory *m, int64_t soon) {
    const int64_t item = a->is_narrow ? 2 : 4, width = a->width, stride = padded_width(a);
    for (int64_t r = 0; r < p->rows; r++) m->largest[r] = -INFINITY, m->totals[r] = 0;
    memset(m->out, 0, (size_t)(p->rows * stride) * sizeof(float));
    const int64_t begin = begin_of(a, end_of(a, p, 0)), end = end_of(a, p, p->rows - 1);
    for (int64_t b = begin / BLOCK; b * BLOCK < end; b++) {
        const int64_t at = place_of_block(a, p, b);
        ask_for_block(a, (b + 1) * BLOCK < end ? place_of_block(a, p, b + 1) : soon);
        const int64_t from = within_block(begin, b), to = within_block(end, b);
        if (a->way->pack_keys) {
            a->way->pack_keys(a->is_narrow, a->keys + at, width, from, to, m->keys);
            a->way->pack_values(a->is_narrow, a->values + at, width, from, to, m->values);
            attend_to_block(a, p, b, m->keys, m->values, m);
        } else attend_to_block(a, p, b, a->keys + at, a->values + at, m);
    }
    for (int64_t r = 0; r < p->rows; r++) {
        float *out = m->out + r * stride;
        for (int64_t d = 0; d < width; d++) out[d] /= m->totals[r];
        a->level->store_row(a->is_narrow, out, a->out + place_of(a, p, r) * width * item, width);
    }
}

static int64_t runs_of(const attention *a, const span *s) {
    return (s->count * (a->heads / a->kv_heads) + ROWS_OF_A_PIECE - 1) / ROWS_OF_A_PIECE;
}

static run run_of(const attention *a, int64_t piece) {
    int64_t index = 0;
    for (int64_t end = a->num_spans; end - index > 1;) { /* the last span that begins at or before the piece */
        const int64_t middle = (index + end) / 2;
        if (a->span_pieces[middle] <= piece) index = middle;
        else end = middle;
    }
    const span *s = &a->spans[index];
    const int64_t inside = piece - a->span_pieces[index], runs = runs_of(a, s);
    run p = {.span = s, .kv = inside / runs, .first = inside % runs * ROWS_OF_A_PIECE};
    p.rows = MIN(s->count * (a->heads / a->kv_heads) - p.first, ROWS_OF_A_PIECE);
    return p;
}

void attend_piece(const attention *a, int64_t piece, float *memory) {
    const run p = run_of(a, piece), next = run_of(a, MIN(piece + 1, a->span_pieces[a->num_spans] - 1));
    const piece_memory m = cut_memory(a, memory);
    attend_run(a, &p, &m, place_of_block(a, &next, begin_of(a, end_of(a, &next, 0)) / BLOCK));
}

void plan_attention(attention *a, int64_t *span_pieces) {
    a->way = a->level->blocks[a->is_narrow];
    a->q_stride = a->width * a->way->item;
    span_pieces[0] = 0;
    for (int64_t i = 0; i < a->num_spans; i++)
        span_pieces[i + 1] = span_pieces[i] + runs_of(a, &a->spans[i]) * a->kv_heads;
    a->span_pieces = span_pieces;
}

typedef struct {
    work work;
    attention attention;
} attention_call;

static void attention_piece(work *w, int phase, int64_t piece, void *memory) {
    const attention *a = &((const attention_call *)w)->attention;
    if (phase == 0) place_tokens(a, piece, memory);
    else attend_piece(a, piece, memory);
}

/* Attention of a step's rows, whose keys and values it first writes to the cache.
   numbers: tokens, heads, kv_heads, width of a head, window (0: none), spans, bytes of a block, most blocks of a span.
   factors: eps of the norms, scale of queries. norms: in qkv's dtype, or NULL. cos, sin: (tokens, width). keys, values: one layer's,
   blocks of (kv_heads, BLOCK, width) in qkv's dtype. blocks, offsets: where each token goes. spans, tables: see span.
   out: (tokens, heads * width) in qkv's dtype. */
int sage_attend(
    int level, int is_narrow, const int64_t *numbers, const float *factors, const void *qkv, const void *q_norm,
    const void *k_norm, const float *cos, const float *sin, void *keys, void *values, const int64_t *blocks,
    const int64_t *offsets, const int64_t *spans, const int64_t *tables, void *out, run_in_threads *run, unsigned threads
) {
    attention_call c = {.attention = {
        .level = level_of(level), .is_narrow = is_narrow, .num_tokens = numbers[0], .heads = numbers[1],
        .kv_heads = numbers[2], .width = numbers[3], .window = numbers[4], .num_spans = numbers[5],
        .block_bytes = numbers[6], .most_blocks = numbers[7], .eps = factors[0], .scale = factors[1], .qkv = qkv,
        .q_norm = q_norm, .k_norm = k_norm, .cos = cos, .sin = sin, .keys = keys, .values = values, .blocks = blocks,
        .offsets = offsets, .spans = (const span *)spans, .tables = tables, .out = out,
    }};
    attention *a = &c.attention;
    int64_t *pieces = malloc((size_t)(a->num_spans + 1) * sizeof *pieces);
    int code = OUT_OF_MEMORY;
    if (pieces) {
        plan_attention(a, pieces);
        a->q = malloc((size_t)(a->num_tokens * a->heads * a->q_stride));
    }
    if (a->q) {
        c.work.pieces[0] = placing_pieces(a);
        c.work.pieces[1] = pieces[a->num_spans];
        c.work.run_piece = attention_piece;
        c.work.memory_bytes = attention_memory(a);
        code = run_work(&c.work, run, threads);
    }
    free(a->q);
    free(pieces);
    return code;
}

typedef struct {
    work work;
    const level *level;
    bool is_narrow;
    int64_t num_rows, width, stride;
    const uint8_t *x, *weight;
    float eps;
    uint8_t *out;
} norm;

static void norm_piece(work *w, int phase, int64_t piece, void *memory) {
    (void)phase;
    const norm *n = (const norm *)w;
    const int64_t item = n->is_narrow ? 2 : 4, end = MIN(n->num_rows, (piece + 1) * ROWS_NORMED);
    for (int64_t r = piece * ROWS_NORMED; r < end; r++) {
        n->level->read_row(n->is_narrow, n->x + r * n->stride, memory, n->width);
        norm_row(n->level, n->is_narrow, memory, n->weight, (float *)memory + n->width, n->eps, n->width);
        n->level->store_row(n->is_narrow, memory, n->out + r * n->width * item, n->width);
    }
}

/* RMS norm of rows, stride bytes apart. weight: (width) and out: (rows, width) in x's dtype. */
int sage_norm(
    int level, int is_narrow, const void *x, int64_t num_rows, int64_t width, int64_t stride, const void *weight,
    float eps, void *out, run_in_threads *run, unsigned threads
) {
    norm n = {
        .level = level_of(level), .is_narrow = is_narrow, .num_rows = num_rows, .width = width, .stride = stride,
        .x = x, .weight = weight, .eps = eps, .out = out,
    };
    n.work.pieces[0] = (num_rows + ROWS_NORMED - 1) / ROWS_NORMED;
    n.work.run_piece = norm_piece;
    n.work.memory_bytes = 2 * (size_t)width * sizeof(float);
    return run_work(&n.work, n.work.pieces[0] > 1 ? run : NULL, threads);
}
