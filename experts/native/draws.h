/* From logits to weights of which tokens are drawn, for one level: whole numbers, the largest logit's ONE. Every operation
   is IEEE's on doubles, each rounded by itself, so that all levels and `router.sampling` get the same. Included after
   lanes.h. */
#include <math.h>

#define DOUBLES (LANES / 2)

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

/* Of what is a number. */
static TARGET double NAME(largest_logit)(int is_wide, const uint8_t *logits, int64_t count) {
    NAME(doubles) most = (NAME(doubles)){0} - INFINITY;
    for (int64_t i = 0; i < count; i += DOUBLES) {
        const NAME(doubles) x =
            i + DOUBLES <= count ? NAME(read_doubles)(is_wide, logits, i) : NAME(read_last)(is_wide, logits, i, count);
        const NAME(whole) is_more = x > most;
        most = (NAME(doubles))(((NAME(whole))x & is_more) | ((NAME(whole))most & ~is_more));
    }
    double largest = most[0];
    for (int lane = 1; lane < DOUBLES; lane++) largest = most[lane] > largest ? most[lane] : largest;
    return largest;
}

/* 2^WEIGHT_BITS * e^((x - largest) / temperature), to the nearest whole number. */
INLINE TARGET NAME(whole) NAME(weigh)(NAME(doubles) x, double largest, double temperature) {
    const NAME(doubles) zero = {0}, lowest = zero - 40.0; /* has no weight, as what is no number has none */
    NAME(doubles) d = (x - largest) / temperature;
    const NAME(whole) is_seen = d > lowest;
    d = (NAME(doubles))(((NAME(whole))d & is_seen) | ((NAME(whole))lowest & ~is_seen));
    const NAME(doubles) shifted = d * LOG2_E + ROUNDER, n = shifted - ROUNDER;
    const NAME(doubles) r = (d - n * LN2_HIGH) - n * LN2_LOW;
    NAME(doubles) p = zero + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const NAME(whole) power = ((NAME(whole))shifted << 52) + ((int64_t)(1023 + WEIGHT_BITS) << 52);
    return (NAME(whole))(p * (NAME(doubles))power + UNITS) - UNITS_AS_BITS;
}

/* weights: room for a multiple of DOUBLES. Returns their sum. */
static TARGET int64_t NAME(weigh_row)(
    int is_wide, const uint8_t *logits, int64_t count, double largest, double temperature, int64_t *weights
) {
    NAME(whole) sums = {0};
    for (int64_t i = 0; i < count; i += DOUBLES) {
        const NAME(doubles) x =
            i + DOUBLES <= count ? NAME(read_doubles)(is_wide, logits, i) : NAME(read_last)(is_wide, logits, i, count);
        const NAME(whole) w = NAME(weigh)(x, largest, temperature);
        *(NAME(loose_whole) *)(weights + i) = w;
        sums += w;
    }
    int64_t sum = 0;
    for (int lane = 0; lane < DOUBLES; lane++) sum += sums[lane];
    return sum;
}
