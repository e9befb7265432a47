/* Attention of some rows with one block of keys and values at level `avx512bf16`, for a cache in bfloat16: products of
   pairs, as the matrices are multiplied; queries and weights are rounded to bfloat16 before. A block lies in the cache as
   it is multiplied, so that nothing has to be packed for a stream's few rows. Otherwise as blocks.h. */
#include "products.h"

#ifdef __x86_64__
#include <immintrin.h>
#include <math.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)
#define MOST 6
#define V __m512
#define PRODUCT(sums, a, b) _mm512_dpbf16_ps(sums, (__m512bh)(a), (__m512bh)(b))

/* Keys lie as (pairs of the width, BLOCK) pairs. */
static void place_key(const uint8_t *row, int64_t width, int64_t position, uint8_t *block) {
    for (int64_t pair = 0; pair < width / 2; pair++) memcpy(block + (pair * BLOCK + position) * 4, row + 4 * pair, 4);
}

/* Values lie as (pairs of positions, width) pairs. */
static void place_value(const uint8_t *row, int64_t width, int64_t position, uint8_t *block) {
    const uint16_t *from = (const uint16_t *)row;
    uint16_t *to = (uint16_t *)block + position / 2 * 2 * width + position % 2;
    for (int64_t d = 0; d < width; d++) to[2 * d] = from[d];
}

/* Far below 0 it is 0, and what is no number stays so. */
INLINE TARGET V power_of_two(V x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
    V e = _mm512_fmadd_ps(f, _mm512_set1_ps(NARROW_POWER_4), _mm512_set1_ps(NARROW_POWER_3));
    e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(NARROW_POWER_2));
    e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(NARROW_POWER_1));
    e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(e, n);
}

/* See blocks.h. The sum is of the rounded weights. */
INLINE TARGET float weigh_scores(
    V x[4], int64_t from, int64_t to, float factor, float *largest, float *total, uint8_t *weights
) {
    if (from >= to) {
        memset(weights, 0, BLOCK * 2);
        return 1.0f;
    }
    if (from > 0 || to < BLOCK) {
        const uint64_t seen = (to < BLOCK ? (1ull << to) - 1 : ~0ull) & (~0ull << from);
        EACH(c, 4) x[c] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(seen >> 16 * c), x[c]);
    }
    const V most = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
    const float before = *largest, found = _mm512_reduce_max_ps(most), now = found > before ? found : before;
    const V shift = _mm512_set1_ps(now * factor);
    EACH(c, 4) x[c] = power_of_two(_mm512_fmsub_ps(x[c], _mm512_set1_ps(factor), shift));
    const __m512i low = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]), high = (__m512i)_mm512_cvtne2ps_pbh(x[3], x[2]);
    _mm512_store_si512(weights, low);
    _mm512_store_si512(weights + 64, high);
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    const float sum = _mm512_reduce_add_ps(PRODUCT(PRODUCT(_mm512_setzero_ps(), low, ones), high, ones));
    float kept = 1.0f;
    if (now != before) kept = _mm512_cvtss_f32(power_of_two(_mm512_fmsub_ps(
        _mm512_set1_ps(before), _mm512_set1_ps(factor), shift)));
    *largest = now;
    *total = *total * kept + sum;
    return kept;
}

INLINE TARGET __m512i pair_of(const uint8_t *row, int64_t pair) {
    int32_t both;
    memcpy(&both, row + 4 * pair, 4);
    return _mm512_set1_epi32(both);
}

INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

/* Weighed values of so many vectors of outputs. Where the positions are odd in number, what others left beside the last
   one is taken for 0: times a weight of 0 it would be, but for what is no number. */
INLINE TARGET void add_values(
    const int rows, const int vectors, const block_tile *t, const uint8_t weights[MOST][BLOCK * 2], const float *kept,
    int64_t positions, int64_t first
) {
    V sums[MOST][4];
    EACH(r, rows) EACH(c, vectors)
        sums[r][c] = _mm512_mul_ps(_mm512_loadu_ps(t->out + r * t->stride + first + 16 * c), _mm512_set1_ps(kept[r]));
    const uint8_t *values = t->values + 4 * first;
    __mmask16 there[4]; /* the last vector of an odd width has less */
    EACH(c, vectors) there[c] = first_lanes(t->width - first - 16 * c);
    for (int64_t pair = 0; 2 * pair < positions; pair++, values += 4 * t->width) {
        const __m512i own = _mm512_set1_epi32(2 * pair + 1 < positions ? -1 : 0xffff);
        __m512i v[4];
        EACH(c, vectors) v[c] = _mm512_and_si512(own, _mm512_maskz_loadu_epi32(there[c], values + 64 * c));
        EACH(r, rows) {
            const __m512i w = pair_of(weights[r], pair);
            EACH(c, vectors) sums[r][c] = PRODUCT(sums[r][c], w, v[c]);
        }
    }
    EACH(r, rows) EACH(c, vectors) _mm512_storeu_ps(t->out + r * t->stride + first + 16 * c, sums[r][c]);
}

INLINE TARGET void attend_rows(const int rows, const block_tile *t) {
    V scores[MOST][4];
    uint8_t weights[MOST][BLOCK * 2] __attribute__((aligned(64)));
    float kept[MOST];
    EACH(r, rows) EACH(c, 4) scores[r][c] = _mm512_setzero_ps();
    const uint8_t *keys = t->keys;
    for (int64_t pair = 0; pair < t->width / 2; pair++, keys += 4 * BLOCK) {
        __m512i k[4];
        EACH(c, 4) k[c] = _mm512_loadu_si512(keys + 64 * c);
        EACH(r, rows) {
            const __m512i q = pair_of(t->q[r], pair);
            EACH(c, 4) scores[r][c] = PRODUCT(scores[r][c], q, k[c]);
        }
    }
    int64_t end = 0;
    EACH(r, rows) {
        kept[r] = weigh_scores(scores[r], t->from[r], t->to[r], t->factor, t->largest + r, t->totals + r, weights[r]);
        end = t->to[r] > end ? t->to[r] : end;
    }
    const int64_t padded = UP_TO(t->width, BLOCK_UNIT);
    int64_t first = 0;
    for (; first + 64 <= padded; first += 64) add_values(rows, 4, t, weights, kept, end, first);
    if (first < padded) add_values(rows, 2, t, weights, kept, end, first);
}

static TARGET void attend(int rows, const block_tile *t) {
    switch (rows) {
        case 1: attend_rows(1, t); break;
        case 2: attend_rows(2, t); break;
        case 3: attend_rows(3, t); break;
        case 4: attend_rows(4, t); break;
        case 5: attend_rows(5, t); break;
        default: attend_rows(6, t);
    }
}

const block_way avx512bf16_blocks = {
    MOST, sizeof(uint16_t), place_key, place_value, NULL, NULL, attend
};
#endif
