/* From logits to weights of which tokens are drawn, for one level: whole numbers, the largest logit's ONE. Every operation
   is IEEE's on doubles, each rounded by itself, so that all levels and `router.sampling` get the same. Included after
   lanes.h. */
#include <math.h>

#define DOUBLES (LANES / 2) /* in a vector */

typedef double NAME(doubles) __attribute__((vector_size(4 * LANES)));
typedef int64_t NAME(whole) __attribute__((vector_size(4 * LANES)));
typedef double NAME(loose_doubles) __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef float NAME(loose_floats) __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef int64_t NAME(loose_whole) __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

INLINE TARGET NAME(doubles) NAME(read_doubles)(int is_wide, const uint8_t *logits, int64_t i) {
    if (is_wide) return *(const NAME(loose_doubles) *)(logits + 8 * i);
    return __builtin_convertvector(*(const NAME(loose_floats) *)(logits + 4 * i), NAME(doubles));
}

/* What stands behind the last whole vector, as one, filled up with what gets no weight. */
INLINE TARGET NAME(doubles) NAME(read_last)(int is_wide, const uint8_t *logits, int64_t i, int64_t count) {
    double values[DOUBLES];
    for (int lane = 0; lane < DOUBLES; lane++) {
        float narrow = 0;
        values[lane] = -INFINITY;
        if (i + lane >= count) continue;
        if (is_wide) memcpy(&values[lane], logits + 8 * (i + lane), 8);
        else memcpy(&narrow, logits + 4 * (i + lane), 4), values[lane] = narrow;
    }
    return *(const NAME(loose_doubles) *)values;
}

#define MAXIMA 32
INLINE TARGET double NAME(largest_of)(const int is_wide, const uint8_t *logits, int64_t count) {
    const double *wide = (const double *)logits;
    const float *narrow = (const float *)logits;
    double most[MAXIMA];
    for (int m = 0; m < MAXIMA; m++) most[m] = -INFINITY;
    int64_t i = 0;
    for (; i + MAXIMA <= count; i += MAXIMA)
        for (int m = 0; m < MAXIMA; m++) {
            const double x = is_wide ? wide[i + m] : narrow[i + m];
            most[m] = x > most[m] ? x : most[m];
        }
    for (int m = 0; i + m < count; m++) {
        const double x = is_wide ? wide[i + m] : narrow[i + m];
        most[m] = x > most[m] ? x : most[m];
    }
    for (int half = MAXIMA / 2; half; half /= 2)
        for (int m = 0; m < half; m++) most[m] = most[m + half] > most[m] ? most[m + half] : most[m];
    return most[0];
}
#undef MAXIMA

/* Of what is a number. */
static TARGET double NAME(largest_logit)(int is_wide, const uint8_t *logits, int64_t count) {
    return is_wide ? NAME(largest_of)(1, logits, count) : NAME(largest_of)(0, logits, count);
}

/* 2^WEIGHT_BITS * e^((x - largest) * sharpness), to the nearest whole number. */
INLINE TARGET NAME(whole) NAME(weigh)(NAME(doubles) x, double largest, double sharpness) {
    const NAME(doubles) zero = {0}, lowest = zero - 40.0; /* has no weight, as what is no number has none */
    NAME(doubles) d = (x - largest) * sharpness;
    const NAME(whole) is_seen = d > lowest;
    d = (NAME(doubles))(((NAME(whole))d & is_seen) | ((NAME(whole))lowest & ~is_seen));
    const NAME(doubles) shifted = d * LOG2_E + ROUNDER, n = shifted - ROUNDER;
    const NAME(doubles) r = (d - n * LN2_HIGH) - n * LN2_LOW;
    /* e^r, to 2^-47: its series, in a tree, since one addition after the other would wait longer than it computes. */
    const NAME(doubles) r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
    const NAME(doubles) low = (1.0 + r) + (1.0 / 2 + r * (1.0 / 6)) * r2;
    const NAME(doubles) middle = (1.0 / 24 + r * (1.0 / 120)) + (1.0 / 720 + r * (1.0 / 5040)) * r2;
    const NAME(doubles) high = (1.0 / 40320 + r * (1.0 / 362880)) + (1.0 / 3628800 + r * (1.0 / 39916800)) * r2;
    const NAME(doubles) p = (low + middle * r4) + high * r8;
    const NAME(whole) power = ((NAME(whole))shifted << 52) + ((int64_t)(1023 + WEIGHT_BITS) << 52);
    return (NAME(whole))(p * (NAME(doubles))power + UNITS) - UNITS_AS_BITS;
}

INLINE TARGET int64_t NAME(weigh_all)(
    const int is_wide, const uint8_t *logits, int64_t count, double largest, double sharpness, int64_t *weights
) {
    NAME(whole) sums = {0};
    int64_t i = 0;
    for (; i + DOUBLES <= count; i += DOUBLES) {
        const NAME(whole) w = NAME(weigh)(NAME(read_doubles)(is_wide, logits, i), largest, sharpness);
        *(NAME(loose_whole) *)(weights + i) = w;
        sums += w;
    }
    if (i < count) {
        const NAME(whole) w = NAME(weigh)(NAME(read_last)(is_wide, logits, i, count), largest, sharpness);
        *(NAME(loose_whole) *)(weights + i) = w;
        sums += w;
    }
    int64_t sum = 0;
    for (int lane = 0; lane < DOUBLES; lane++) sum += sums[lane];
    return sum;
}

/* weights: room for a multiple of DOUBLES. Returns their sum. */
static TARGET int64_t NAME(weigh_row)(
    int is_wide, const uint8_t *logits, int64_t count, double largest, double sharpness, int64_t *weights
) {
    return is_wide ? NAME(weigh_all)(1, logits, count, largest, sharpness, weights)
                   : NAME(weigh_all)(0, logits, count, largest, sharpness, weights);
}
