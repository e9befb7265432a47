/* The signals of router/snarc.py, which has the formulas: surprise, novelty and arousal of rows against the positions before
   them, and conflict of their gates. A row's bits depend on what the row itself sees alone.

   Called by router/native_signals.py, which has checked pointers and shapes. */
#include "work.h"

#include <math.h>

#define ROWS_SEEN 16
#define TINY 1e-6f
#define OUTSIDE 3

typedef struct {
    int64_t num_rows, groups, size;     /* width = groups * size */
    int64_t num_ring_rows, back, recent; /* how far back rows look, and for surprise */
    int64_t stride;                     /* bytes between rows */
    const uint8_t *hidden;
    const float *signs;                 /* (groups, size) */
    const float *ring_directions, *ring_lengths; /* (ring rows, size), (ring rows) */
    const int64_t *past;                /* (rows, back): ring rows, then these rows */
    const float *num_recent, *num_past; /* of each row, at least 1 */
    int64_t num_kept;
    const int64_t *kept_rows;           /* NULL: all, in order */
    float *kept_directions, *kept_lengths;
    float *directions, *lengths;        /* of these rows */
    float *surprise, *novelty, *arousal; /* NULL: not asked for */
    int32_t is_narrow;
} past_signals;

typedef struct {
    work work;
    const past_signals *s;
} signals_work;

static void sketch_row(const past_signals *s, int64_t row) {
    const uint8_t *hidden = s->hidden + row * s->stride;
    float *direction = s->directions + row * s->size, square = 0;
    memset(direction, 0, (size_t)s->size * sizeof *direction);
    for (int64_t g = 0; g < s->groups; g++) {
        const float *signs = s->signs + g * s->size;
        if (s->is_narrow) {
            const uint16_t *from = (const uint16_t *)hidden + g * s->size;
            for (int64_t i = 0; i < s->size; i++) direction[i] += from_bfloat16(from[i]) * signs[i];
        } else {
            const float *from = (const float *)hidden + g * s->size;
            for (int64_t i = 0; i < s->size; i++) direction[i] += from[i] * signs[i];
        }
    }
    for (int64_t i = 0; i < s->size; i++) square += direction[i] * direction[i];
    const float length = sqrtf(square), divisor = length < TINY ? TINY : length;
    for (int64_t i = 0; i < s->size; i++) direction[i] /= divisor;
    s->lengths[row] = length;
}

static const float *direction_of(const past_signals *s, int64_t at) {
    return at < s->num_ring_rows ? s->ring_directions + at * s->size : s->directions + (at - s->num_ring_rows) * s->size;
}

/* predicted: room for a direction. */
static float surprise_of(const past_signals *s, int64_t row, const int64_t *past, float *predicted) {
    const float *direction = s->directions + row * s->size;
    float distance = 0, length = 0;
    memset(predicted, 0, (size_t)s->size * sizeof *predicted);
    for (int64_t b = 0; b < s->recent; b++) {
        const float *before = direction_of(s, past[b]);
        for (int64_t i = 0; i < s->size; i++) predicted[i] += before[i];
    }
    for (int64_t i = 0; i < s->size; i++) {
        const float mean = predicted[i] / s->num_recent[row], off = direction[i] - mean;
        distance += off * off, length += mean * mean;
    }
    const float share = sqrtf(distance) / (sqrtf(length) + 1.0f);
    return share > 1.0f ? 1.0f : share;
}

static float novelty_of(const past_signals *s, int64_t row, const int64_t *past) {
    const float *direction = s->directions + row * s->size;
    float nearest = 0;
    for (int64_t b = 0; b < s->back; b++) {
        const float *other = direction_of(s, past[b]);
        float cosine = 0;
        for (int64_t i = 0; i < s->size; i++) cosine += other[i] * direction[i];
        nearest = cosine > nearest ? cosine : nearest;
    }
    return 1.0f - (nearest > 1.0f ? 1.0f : nearest);
}

static float arousal_of(const past_signals *s, int64_t row, const int64_t *past) {
    float sum = 0;
    for (int64_t b = 0; b < s->back; b++)
        sum += past[b] < s->num_ring_rows ? s->ring_lengths[past[b]] : s->lengths[past[b] - s->num_ring_rows];
    const float both = s->lengths[row] + sum / s->num_past[row];
    return s->lengths[row] / (both < TINY ? TINY : both);
}

/* Phases: 0 sketches rows, 1 looks back. */
static void signals_piece(work *w, int phase, int64_t piece, void *memory) {
    const past_signals *s = ((const signals_work *)w)->s;
    const int64_t end = MIN(s->num_rows, (piece + 1) * ROWS_SEEN);
    for (int64_t row = piece * ROWS_SEEN; row < end; row++) {
        const int64_t *past = s->past + row * s->back;
        if (!phase) {
            sketch_row(s, row);
            continue;
        }
        if (s->surprise) s->surprise[row] = surprise_of(s, row, past, memory);
        if (s->novelty) s->novelty[row] = novelty_of(s, row, past);
        if (s->arousal) s->arousal[row] = arousal_of(s, row, past);
    }
}

static bool is_inside(const past_signals *s) {
    for (int64_t i = 0; i < s->num_rows * s->back; i++)
        if (s->past[i] < 0 || s->past[i] >= s->num_ring_rows + s->num_rows) return false;
    for (int64_t i = 0; i < s->num_kept; i++) {
        const int64_t row = s->kept_rows ? s->kept_rows[i] : i;
        if (row < 0 || row >= s->num_rows) return false;
    }
    return s->recent <= s->back;
}

/* And the kept rows' directions and lengths. Returns OUTSIDE where a number reaches outside ring or rows. */
int sage_past_signals(void *given, run_in_threads *run, unsigned threads) {
    const past_signals *s = given;
    if (!is_inside(s)) return OUTSIDE;
    signals_work all = { .s = s };
    all.work.pieces[0] = all.work.pieces[1] = (s->num_rows + ROWS_SEEN - 1) / ROWS_SEEN;
    all.work.run_piece = signals_piece;
    all.work.memory_bytes = (size_t)s->size * sizeof(float);
    const int code = run_work(&all.work, all.work.pieces[0] > 1 ? run : NULL, threads);
    for (int64_t i = 0; !code && i < s->num_kept; i++) {
        const int64_t row = s->kept_rows ? s->kept_rows[i] : i;
        memcpy(s->kept_directions + i * s->size, s->directions + row * s->size, (size_t)s->size * sizeof(float));
        s->kept_lengths[i] = s->lengths[row];
    }
    return code;
}

/* Entropy of each row's softmax over its maximum, ln(experts). logits: (rows, experts). */
int sage_conflict(const float *logits, int64_t num_rows, int64_t num_experts, float *out) {
    const float most = logf((float)num_experts);
    for (int64_t row = 0; row < num_rows; row++) {
        const float *from = logits + row * num_experts;
        float highest = from[0], sum = 0, weighted = 0;
        for (int64_t e = 1; e < num_experts; e++) highest = from[e] > highest ? from[e] : highest;
        for (int64_t e = 0; e < num_experts; e++) {
            const float below = from[e] - highest, power = expf(below);
            sum += power, weighted += power * below;
        }
        const float share = num_experts > 1 ? (logf(sum) - weighted / sum) / most : 0.0f;
        out[row] = share < 0 ? 0.0f : share > 1.0f ? 1.0f : share;
    }
    return 0;
}
