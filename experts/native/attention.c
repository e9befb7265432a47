/* Attention over blocks of cached keys and values, and norms. A row's bits depend on its query and on the keys and values
   that it sees: scores by the tiles of products.c, the largest of them, weights, then value after value, block after block.
   Blocks that a row does not see would add zeros, so leaving them out changes nothing. All of it in float32.

   Called by router/native_attention.py, which has checked pointers, shapes, block numbers and limits. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>

#define ROWS_NORMED 32

/* memory: room for the weights, which are in the rows' dtype. */
void norm_row(
    const level *level, bool is_narrow, float *x, const uint8_t *weight, float *memory, float eps, int64_t count
) {
    const float mean = level->square_sum(x, count) / (float)count;
    read_row(is_narrow, weight, memory, count);
    level->scale(x, memory, 1.0f / sqrtf(mean + eps), count, is_narrow);
}

/* Pairs (i, i + half), as rotary embeddings do. */
static void rotate(const float *x, const float *cos, const float *sin, float *to, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        to[i] = x[i] * cos[i] - x[half + i] * sin[i];
        to[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
    }
}

/* One token's heads: norm, rotation; keys and values go to the cache. */
void place_token(const attention *a, int64_t t, float *x) {
    float *turned = x + a->width;
    const int64_t item = a->is_narrow ? 2 : 4, width = a->width;
    const uint8_t *row = a->qkv + t * (a->heads + 2 * a->kv_heads) * width * item;
    const float *cos = a->cos + t * width, *sin = a->sin + t * width;
    for (int64_t h = 0; h < a->heads; h++) {
        read_row(a->is_narrow, row + h * width * item, x, width);
        if (a->q_norm) norm_row(a->level, a->is_narrow, x, a->q_norm, turned, a->eps, width);
        rotate(x, cos, sin, turned, width);
        for (int64_t d = 0; d < width; d++) turned[d] *= a->scale;
        pack_row(a->way, false, turned, a->q + (t * a->heads + h) * a->q_stride, width);
    }
    for (int64_t h = 0; h < a->kv_heads; h++) {
        const int64_t at = a->blocks[t] * a->block_bytes + (h * BLOCK + a->offsets[t]) * width * item;
        read_row(a->is_narrow, row + (a->heads + h) * width * item, x, width);
        if (a->k_norm) norm_row(a->level, a->is_narrow, x, a->k_norm, turned, a->eps, width);
        rotate(x, cos, sin, turned, width);
        store_row(a->is_narrow, turned, a->keys + at, width);
        memcpy(a->values + at, row + (a->heads + a->kv_heads + h) * width * item, (size_t)(width * item));
    }
}

/* Some query rows of one span that share a key-value head. memory: scores (rows, most_blocks * BLOCK), outputs. */
static void attend_rows(const attention *a, const span *s, int64_t kv, int64_t first, int rows, float *memory) {
    const int64_t item = a->is_narrow ? 2 : 4, width = a->width, shared = a->heads / a->kv_heads;
    const int64_t stride = a->most_blocks * BLOCK;
    float *scores = memory, *out = memory + MOST_ROWS * stride;
    int64_t from[MOST_ROWS] = {0}, to[MOST_ROWS] = {0}, token[MOST_ROWS], head[MOST_ROWS];
    tile t = {.inputs = width, .row_bytes = width * item, .outputs = BLOCK, .stride = stride};
    for (int r = 0; r < rows; r++) {
        token[r] = s->first_row + (first + r) / shared;
        head[r] = kv * shared + (first + r) % shared;
        to[r] = s->first_position + (first + r) / shared + 1;
        from[r] = a->window && to[r] > a->window ? to[r] - a->window : 0;
        t.x[r] = a->q + (token[r] * a->heads + head[r]) * a->q_stride;
    }
    const int64_t first_block = from[0] / BLOCK, end_block = (to[rows - 1] + BLOCK - 1) / BLOCK;
    const int64_t *table = a->tables + s->table_start;
    for (int64_t b = first_block; b < end_block; b++) {
        const uint8_t *keys = a->keys + table[b] * a->block_bytes + kv * BLOCK * width * item;
        t.weights = keys;
        t.soon = a->keys + table[b + 1 < end_block ? b + 1 : b] * a->block_bytes + kv * BLOCK * width * item;
        t.out = scores + b * BLOCK;
        a->way->tiles[rows - 1](&t);
    }
    float totals[MOST_ROWS];
    for (int r = 0; r < rows; r++) {
        float *row = scores + r * stride;
        for (int64_t j = first_block * BLOCK; j < from[r]; j++) row[j] = -INFINITY;
        for (int64_t j = to[r]; j < end_block * BLOCK; j++) row[j] = -INFINITY;
        float largest = -INFINITY;
        for (int64_t j = from[r]; j < to[r]; j++) largest = row[j] > largest || row[j] != row[j] ? row[j] : largest;
        totals[r] = 0;
        for (int64_t b = first_block; b < end_block; b++)
            totals[r] += a->level->softmax_weights(row + b * BLOCK, largest, BLOCK);
        for (int64_t d = 0; d < width; d++) out[r * width + d] = 0;
    }
    for (int64_t b = first_block; b < end_block; b++) {
        const uint8_t *values = a->values + table[b] * a->block_bytes + kv * BLOCK * width * item;
        const int64_t begin = b * BLOCK < from[0] ? from[0] - b * BLOCK : 0;
        const int64_t end = (b + 1) * BLOCK > to[rows - 1] ? to[rows - 1] - b * BLOCK : BLOCK;
        a->level->add_values(
            rows, a->is_narrow, scores + b * BLOCK, stride, values, width, begin, end, out, width);
    }
    for (int r = 0; r < rows; r++) {
        for (int64_t d = 0; d < width; d++) out[r * width + d] /= totals[r];
        store_row(a->is_narrow, out + r * width, a->out + (token[r] * a->heads + head[r]) * width * item, width);
    }
}

static int64_t tiles_of(const attention *a, const span *s) {
    const int64_t rows = s->count * (a->heads / a->kv_heads);
    return (rows + a->way->most_rows - 1) / a->way->most_rows;
}

void attend_piece(const attention *a, int64_t piece, float *memory) {
    int64_t index = 0;
    for (int64_t end = a->num_spans; end - index > 1;) { /* the last span that begins at or before the piece */
        const int64_t middle = (index + end) / 2;
        if (a->span_pieces[middle] <= piece) index = middle;
        else end = middle;
    }
    const span *s = &a->spans[index];
    const int64_t inside = piece - a->span_pieces[index], tiles = tiles_of(a, s);
    const int64_t rows = s->count * (a->heads / a->kv_heads), first = inside % tiles * a->way->most_rows;
    attend_rows(a, s, inside / tiles, first, (int)MIN(rows - first, a->way->most_rows), memory);
}

void plan_attention(attention *a, int64_t *span_pieces) {
    a->way = &a->level->wide[a->is_narrow ? BFLOAT16 : FLOAT32];
    a->q_stride = packed_stride(a->way, a->width);
    span_pieces[0] = 0;
    for (int64_t i = 0; i < a->num_spans; i++)
        span_pieces[i + 1] = span_pieces[i] + tiles_of(a, &a->spans[i]) * a->kv_heads;
    a->span_pieces = span_pieces;
}

size_t attention_memory(const attention *a) {
    return (size_t)(MOST_ROWS * (a->most_blocks * BLOCK + a->width) + 2 * a->width) * sizeof(float);
}

typedef struct {
    work work;
    attention attention;
} attention_call;

static void attention_piece(work *w, int phase, int64_t piece, void *memory) {
    const attention *a = &((const attention_call *)w)->attention;
    if (phase == 0) place_token(a, piece, memory);
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
        a->q = aligned_alloc(64, (size_t)(a->num_tokens * a->heads * a->q_stride));
    }
    if (a->q) {
        c.work.pieces[0] = a->num_tokens;
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
        read_row(n->is_narrow, n->x + r * n->stride, memory, n->width);
        norm_row(n->level, n->is_narrow, memory, n->weight, (float *)memory + n->width, n->eps, n->width);
        store_row(n->is_narrow, memory, n->out + r * n->width * item, n->width);
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
