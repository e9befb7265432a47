/* Draws tokens from rows of logits: each row alone, in whole numbers, so that neither threads nor levels nor the rows
   beside it change one. router/sampling.py says what is drawn, and does the same in PyTorch.

   Called by router/native_sampling.py, which has checked pointers and shapes. */
#include "work.h"

#define TOKENS_SUMMED 256
#define ID_BITS 20
#define MOST_ID ((INT64_C(1) << ID_BITS) - 1)
#define MANY_TOKENS (1 << 17) /* below it waking a thread takes longer than the work */

typedef struct {
    const uint8_t *logits;
    int64_t top_k;                    /* 0: all */
    double sharpness;                 /* 1 / temperature; finite */
    double top_p, min_p;              /* 1 and 0: no bound */
    double uniform;                   /* in [0, 1) */
} drawing;

typedef struct {
    work work;
    const level *level;
    int is_wide;
    const drawing *rows;
    int64_t vocab_size, *tokens;
} draws;

static bool has_filters(const drawing *row) { return row->top_k || row->top_p < 1 || row->min_p > 0; }

/* Which of so many units is meant: -1 of none. */
static int64_t unit_of(double uniform, int64_t total) {
    const double unit = uniform * (double)total;
    return MIN((int64_t)unit, total - 1);
}

/* sums: room for one of each TOKENS_SUMMED tokens. */
static int64_t draw_any(const draws *d, const drawing *row, int64_t *sums) {
    int64_t weights[TOKENS_SUMMED], total = 0;
    const int64_t item = d->is_wide ? 8 : 4;
    const double largest = d->level->largest_logit(d->is_wide, row->logits, d->vocab_size);
    for (int64_t i = 0; i < d->vocab_size; i += TOKENS_SUMMED)
        total += sums[i / TOKENS_SUMMED] = d->level->weigh(
            d->is_wide, row->logits + i * item, MIN(TOKENS_SUMMED, d->vocab_size - i), largest, row->sharpness, weights);
    int64_t unit = unit_of(row->uniform, total), block = 0, token = 0;
    if (unit < 0) return 0;
    while (unit >= sums[block]) unit -= sums[block++];
    const int64_t first = block * TOKENS_SUMMED;
    d->level->weigh(
        d->is_wide, row->logits + first * item, MIN(TOKENS_SUMMED, d->vocab_size - first), largest, row->sharpness,
        weights);
    while (unit >= weights[token]) unit -= weights[token++];
    return first + token;
}

static void sink(int64_t *heap, int64_t count, int64_t at) {
    const int64_t key = heap[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && heap[child + 1] > heap[child]) child++;
        if (heap[child] <= key) break;
        heap[at] = heap[child];
    }
    heap[at] = key;
}

/* Brings the largest of the first `count` keys to their end. */
static int64_t pop(int64_t *heap, int64_t count) {
    const int64_t best = heap[0];
    heap[0] = heap[count - 1];
    sink(heap, count - 1, 0);
    return heap[count - 1] = best;
}

/* Weights become keys (weight, then the lower token first) of those that may be drawn, in a heap, and perhaps of some
   more. Returns how many. */
static int64_t gather(const drawing *row, int64_t *weights, int64_t vocab_size, int64_t total) {
    int64_t counts[64] = {0}, sums[64] = {0}, count = 0, num_keys = 0, sum = 0;
    int bits = 63; /* of a weight, as many as those have that are needed */
    for (int64_t i = 0; i < vocab_size; i++) {
        const int length = weights[i] ? 64 - __builtin_clzll((unsigned long long)weights[i]) : 0;
        counts[length]++, sums[length] += weights[i];
    }
    for (; bits > 1; bits--) {
        count += counts[bits], sum += sums[bits];
        if (!count) continue;
        if (row->top_k ? count >= row->top_k : row->top_p < 1 && (double)sum >= row->top_p * (double)total) break;
    }
    const double lowest = row->top_k ? 0 : row->min_p * (double)ONE;
    for (int64_t i = 0; i < vocab_size; i++)
        if (weights[i] >> (bits - 1) && (double)weights[i] >= lowest)
            weights[num_keys++] = weights[i] << ID_BITS | (MOST_ID - i);
    for (int64_t i = num_keys / 2; i-- > 0;) sink(weights, num_keys, i);
    return num_keys;
}

/* weights: room for all tokens, and a multiple of 8. */
static int64_t draw_filtered(const draws *d, const drawing *row, int64_t *weights) {
    const double largest = d->level->largest_logit(d->is_wide, row->logits, d->vocab_size);
    int64_t total = d->level->weigh(d->is_wide, row->logits, d->vocab_size, largest, row->sharpness, weights);
    if (!total) return 0;
    const int64_t num_keys = gather(row, weights, d->vocab_size, total), last = num_keys - 1;
    int64_t num_popped = 0, num_kept = 0, kept = 0;
    if (row->top_k)
        for (total = 0; num_popped < MIN(row->top_k, num_keys); num_popped++)
            total += pop(weights, num_keys - num_popped) >> ID_BITS;
    const int64_t most = row->top_k ? num_popped : num_keys;
    for (; num_kept < most; num_kept++) {
        if (num_kept == num_popped) pop(weights, num_keys - num_popped++);
        const int64_t weight = weights[last - num_kept] >> ID_BITS;
        const bool is_outside = row->top_p < 1 && (double)kept >= row->top_p * (double)total;
        if (num_kept && (is_outside || (double)weight < row->min_p * (double)ONE)) break;
        kept += weight;
    }
    int64_t unit = unit_of(row->uniform, kept), at = last;
    while (unit >= weights[at] >> ID_BITS) unit -= weights[at--] >> ID_BITS;
    return MOST_ID - (weights[at] & MOST_ID);
}

static void draw_piece(work *w, int phase, int64_t piece, void *memory) {
    (void)phase;
    const draws *d = (const draws *)w;
    const drawing *row = &d->rows[piece];
    d->tokens[piece] = has_filters(row) ? draw_filtered(d, row, memory) : draw_any(d, row, memory);
}

/* rows: num_rows drawings, whose logits are float32, or float64 where is_wide. vocab_size: at most 2^ID_BITS. */
int sage_draw(
    int level, int is_wide, const void *rows, int64_t num_rows, int64_t vocab_size, int64_t *tokens,
    run_in_threads *run, unsigned threads
) {
    draws d = {
        .level = level_of(level), .is_wide = is_wide, .rows = rows, .vocab_size = vocab_size, .tokens = tokens,
    };
    bool is_filtered = false;
    for (int64_t i = 0; i < num_rows; i++) is_filtered = is_filtered || has_filters(&d.rows[i]);
    d.work.pieces[0] = num_rows;
    d.work.run_piece = draw_piece;
    const int64_t places = is_filtered ? UP_TO(vocab_size, 8) : vocab_size / TOKENS_SUMMED + 1;
    d.work.memory_bytes = (size_t)places * sizeof(int64_t);
    const bool is_shared = num_rows > 1 && num_rows * vocab_size >= MANY_TOKENS;
    return run_work(&d.work, is_shared ? run : NULL, threads);
}
