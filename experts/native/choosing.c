/* Experts by snarc scores, and means in place of absent ones. A row's choice depends on its own logits and signals and on
   facts of the experts; of equal scores the lower expert comes first.

   Called by router/native_choosing.py, which has checked pointers and shapes. */
#include "routing.h"

#include <math.h>

#define ROWS_CHOSEN 16
#define KEPT 1e6f     /* above every score; of a row's best experts, where they are to be kept */
#define LEAST 1e-6f   /* range of logits */

typedef struct {
    int64_t num_rows, num_experts, top_k, keep_best;
    const float *logits;             /* (rows, experts) */
    const float *surprise, *reward;  /* of each row; NULL: the term weighs nothing */
    const float *novelty, *trust;    /* of each expert */
    const float *sizes;              /* of experts' outputs; NULL: nothing stands in for them */
    const uint8_t *cold;             /* whether an expert is not resident */
    int64_t *chosen;                 /* (rows, top_k), as are the next three; best first */
    float *weights;
    uint8_t *is_cold, *is_spared;
    float gate_weight, novelty_weight, trust_weight, warmth_weight, threshold;
    int32_t is_scaled, is_normalised;
    int64_t num_replaced;            /* rows of which something is spared, when it is done */
} choices;

typedef struct {
    work work;
    const level *level;
    const choices *c;
} choosing;

/* Of a row's scores, most first. at: so many places. */
static void take_best(const float *scores, int64_t count, int64_t most, int64_t *at) {
    int64_t found = 0;
    for (int64_t e = 0; e < count; e++) {
        if (found == most && !(scores[e] > scores[at[most - 1]])) continue;
        int64_t place = found < most ? found++ : most - 1;
        for (; place > 0 && scores[e] > scores[at[place - 1]]; place--) at[place] = at[place - 1];
        at[place] = e;
    }
}

static void score_row(const choices *c, int64_t row, const float *logits, float *scores) {
    float scale = c->gate_weight;
    if (c->is_scaled) {
        float low = logits[0], high = logits[0];
        for (int64_t e = 1; e < c->num_experts; e++) {
            low = logits[e] < low ? logits[e] : low;
            high = logits[e] > high ? logits[e] : high;
        }
        const float range = high - low;
        scale /= range > LEAST ? range : LEAST;
    }
    for (int64_t e = 0; e < c->num_experts; e++) {
        float score = logits[e] * scale;
        if (c->surprise) score += c->surprise[row] * (c->novelty[e] * c->novelty_weight);
        if (c->reward) score += c->reward[row] * (c->trust[e] * c->trust_weight);
        if (c->warmth_weight != 0) score += c->cold[e] ? 0.0f : c->warmth_weight;
        scores[e] = score;
    }
}

static void keep_best(const choices *c, const float *logits, float *scores, int64_t *at) {
    const int64_t kept = MIN(c->keep_best, c->top_k);
    take_best(logits, c->num_experts, kept, at);
    for (int64_t k = 0; k < kept; k++) scores[at[k]] = KEPT + (float)(kept - k);
}

/* Those that are absent, and whose part in the output is below a share of an even one; never the heaviest. */
static void spare_row(const choices *c, const int64_t *chosen, const float *weights, const uint8_t *cold, uint8_t *spared) {
    float sum = 0;
    int64_t heaviest = 0;
    for (int64_t k = 0; k < c->top_k; k++) {
        sum += weights[k];
        heaviest = weights[k] > weights[heaviest] ? k : heaviest;
    }
    const float least = sum * c->threshold;
    for (int64_t k = 0; k < c->top_k; k++)
        spared[k] = cold[k] && k != heaviest && weights[k] * c->sizes[chosen[k]] < least;
}

static void choose_row(const choosing *all, int64_t row, float *memory) {
    const choices *c = all->c;
    const int64_t padded = UP_TO(c->num_experts, UNIT), at = row * c->top_k;
    const float *logits = c->logits + row * c->num_experts;
    int64_t *chosen = c->chosen + at;
    float *weights = c->weights + at, sum = 0;
    score_row(c, row, logits, memory);
    if (c->keep_best) keep_best(c, logits, memory, chosen);
    take_best(memory, c->num_experts, c->top_k, chosen);
    memcpy(memory, logits, (size_t)c->num_experts * sizeof *memory);
    for (int64_t e = c->num_experts; e < padded; e++) memory[e] = -INFINITY;
    all->level->softmax(memory, padded);
    for (int64_t k = 0; k < c->top_k; k++) {
        weights[k] = memory[chosen[k]];
        sum += weights[k];
        c->is_cold[at + k] = c->cold[chosen[k]];
    }
    for (int64_t k = 0; c->is_normalised && k < c->top_k; k++) weights[k] /= sum;
    if (c->sizes) spare_row(c, chosen, weights, c->is_cold + at, c->is_spared + at);
}

static void choosing_piece(work *w, int phase, int64_t piece, void *memory) {
    (void)phase;
    const choosing *all = (const choosing *)w;
    const int64_t end = MIN(all->c->num_rows, (piece + 1) * ROWS_CHOSEN);
    for (int64_t row = piece * ROWS_CHOSEN; row < end; row++) choose_row(all, row, memory);
}

int sage_choose(int level, void *given, run_in_threads *run, unsigned threads) {
    choices *c = given;
    choosing all = { .level = level_of(level), .c = c };
    all.work.pieces[0] = (all.c->num_rows + ROWS_CHOSEN - 1) / ROWS_CHOSEN;
    all.work.run_piece = choosing_piece;
    all.work.memory_bytes = (size_t)UP_TO(all.c->num_experts, UNIT) * sizeof(float);
    const int code = run_work(&all.work, all.work.pieces[0] > 1 ? run : NULL, threads);
    for (int64_t row = 0; c->sizes && !code && row < c->num_rows; row++)
        c->num_replaced += memchr(c->is_spared + row * c->top_k, 1, (size_t)c->top_k) != NULL;
    return code;
}

typedef struct {
    int64_t num_rows, num_experts, top_k, width, num_replaced;
    const int64_t *rows;        /* (replaced): rows of which something is spared */
    const int64_t *chosen;      /* (rows, top_k), as are the next two */
    const float *weights;
    const uint8_t *is_spared;
    const float *means;         /* (experts, width) */
    float *out;                 /* (replaced, width) */
} stand_ins;

typedef struct {
    work work;
    const stand_ins *s;
} standing_in;

/* The weighted means of what is spared in a row, rank by rank. */
static void standing_in_piece(work *w, int phase, int64_t piece, void *memory) {
    (void)phase, (void)memory;
    const stand_ins *s = ((const standing_in *)w)->s;
    const int64_t at = s->rows[piece] * s->top_k;
    float *out = s->out + piece * s->width;
    memset(out, 0, (size_t)s->width * sizeof *out);
    for (int64_t k = at; k < at + s->top_k; k++) {
        if (!s->is_spared[k]) continue;
        const float *mean = s->means + s->chosen[k] * s->width, weight = s->weights[k];
        for (int64_t d = 0; d < s->width; d++) out[d] += weight * mean[d];
    }
}

/* Returns 3 where a number reaches outside the rows or the experts. */
int sage_stand_in(const void *given, run_in_threads *run, unsigned threads) {
    const stand_ins *s = given;
    standing_in all = { .s = s };
    for (int64_t i = 0; i < s->num_replaced; i++) {
        if (s->rows[i] < 0 || s->rows[i] >= s->num_rows) return 3;
        for (int64_t k = s->rows[i] * s->top_k; k < (s->rows[i] + 1) * s->top_k; k++)
            if (s->chosen[k] < 0 || s->chosen[k] >= s->num_experts) return 3;
    }
    all.work.pieces[0] = s->num_replaced;
    all.work.run_piece = standing_in_piece;
    return run_work(&all.work, s->num_replaced > ROWS_CHOSEN ? run : NULL, threads);
}
