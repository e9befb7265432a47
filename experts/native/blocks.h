/* Attention of some rows with one block of keys and values, in float32, for one level. Included after lanes.h. A row's
   scores, weights and outputs are sums over one element after another, so that its bits depend on nothing but the row
   and what it sees: neither on the rows beside it nor on what else is packed with its block. */

#include <math.h>

#define SCORE_VECTORS 4 /* at once; of a row's scores and of its outputs */

/* Keys to (width, BLOCK) float32, those outside [from, to) as zeros. */
static TARGET void NAME(pack_keys)(
    int is_narrow, const uint8_t *keys, int64_t width, int64_t from, int64_t to, uint8_t *packed
) {
    float *out = (float *)packed;
    for (int64_t d = 0; d < width; d++) {
        for (int64_t j = 0; j < from; j++) out[d * BLOCK + j] = 0;
        if (is_narrow)
            for (int64_t j = from; j < to; j++)
                out[d * BLOCK + j] = from_bfloat16(((const uint16_t *)keys)[j * width + d]);
        else
            for (int64_t j = from; j < to; j++) out[d * BLOCK + j] = ((const float *)keys)[j * width + d];
        for (int64_t j = to; j < BLOCK; j++) out[d * BLOCK + j] = 0;
    }
}

/* Values to (BLOCK, width rounded up) float32, the same way. */
static TARGET void NAME(pack_values)(
    int is_narrow, const uint8_t *values, int64_t width, int64_t from, int64_t to, uint8_t *packed
) {
    const int64_t padded = UP_TO(width, BLOCK_UNIT);
    memset(packed, 0, (size_t)(BLOCK * padded) * sizeof(float));
    for (int64_t j = from; j < to; j++) {
        float *out = (float *)packed + j * padded;
        if (is_narrow)
            for (int64_t d = 0; d < width; d++) out[d] = from_bfloat16(((const uint16_t *)values)[j * width + d]);
        else memcpy(out, (const float *)values + j * width, (size_t)width * sizeof(float));
    }
}

INLINE TARGET float NAME(power_of_two)(float x) {
    const int is_seen = !(x < -126.0f); /* below it is 0; what is no number stays so */
    const float y = is_seen ? x : 0.0f;
    const float n = (y + 12582912.0f) - 12582912.0f;
    const float f = y - n;
    float e = FMA1(f, POWER_5, POWER_4);
    e = FMA1(e, f, POWER_3);
    e = FMA1(e, f, POWER_2);
    e = FMA1(e, f, POWER_1);
    e = FMA1(e, f, 1.0f);
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return is_seen ? e * power : 0.0f;
}

/* Scores of a block to weights relative to the largest score so far. Returns what sums so far are multiplied by. */
INLINE TARGET float NAME(weigh_scores)(float *x, int64_t from, int64_t to, float factor, float *largest, float *total) {
    if (from >= to) {
        memset(x, 0, BLOCK * sizeof *x);
        return 1.0f;
    }
    for (int64_t j = 0; j < from; j++) x[j] = -INFINITY;
    for (int64_t j = to; j < BLOCK; j++) x[j] = -INFINITY;
    float most[16], sums[16] = {0};
    for (int lane = 0; lane < 16; lane++) most[lane] = x[lane];
    for (int64_t j = 16; j < BLOCK; j += 16)
        for (int lane = 0; lane < 16; lane++) most[lane] = x[j + lane] > most[lane] ? x[j + lane] : most[lane];
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            most[lane] = most[lane + half] > most[lane] ? most[lane + half] : most[lane];
    const float before = *largest, now = most[0] > before ? most[0] : before;
    for (int64_t j = 0; j < BLOCK; j += 16)
        for (int lane = 0; lane < 16; lane++) {
            x[j + lane] = NAME(power_of_two)((x[j + lane] - now) * factor);
            sums[lane] += x[j + lane];
        }
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    const float kept = now == before ? 1.0f : NAME(power_of_two)((before - now) * factor);
    *largest = now;
    *total = *total * kept + sums[0];
    return kept;
}

INLINE TARGET void NAME(attend_rows)(const int rows, const block_tile *t) {
    float scores[MOST][BLOCK] __attribute__((aligned(64))), kept[MOST];
    for (int64_t first = 0; first < BLOCK; first += SCORE_VECTORS * LANES) {
        V sums[MOST][SCORE_VECTORS];
        EACH(r, rows) EACH(c, SCORE_VECTORS) sums[r][c] = ZERO();
        for (int64_t d = 0; d < t->width; d++) {
            const float *keys = (const float *)t->keys + d * BLOCK + first;
            V k[SCORE_VECTORS];
            EACH(c, SCORE_VECTORS) k[c] = LOAD(keys + c * LANES);
            EACH(r, rows) {
                V q = FILLED(((const float *)t->q[r])[d]);
                EACH(c, SCORE_VECTORS) sums[r][c] = FMA(q, k[c], sums[r][c]);
            }
        }
        EACH(r, rows) EACH(c, SCORE_VECTORS) STOREU(scores[r] + first + c * LANES, sums[r][c]);
    }
    int64_t end = 0;
    for (int r = 0; r < rows; r++) {
        kept[r] = NAME(weigh_scores)(scores[r], t->from[r], t->to[r], t->factor, t->largest + r, t->totals + r);
        end = t->to[r] > end ? t->to[r] : end;
    }
    const int64_t padded = UP_TO(t->width, BLOCK_UNIT);
    for (int64_t first = 0; first < padded; first += 2 * LANES) {
        V sums[MOST][2];
        EACH(r, rows) EACH(c, 2)
            sums[r][c] = LOADU(t->out + r * t->stride + first + c * LANES) * FILLED(kept[r]);
        for (int64_t j = 0; j < end; j++) {
            const float *values = (const float *)t->values + j * padded + first;
            V v[2];
            EACH(c, 2) v[c] = LOAD(values + c * LANES);
            EACH(r, rows) {
                V w = FILLED(scores[r][j]);
                EACH(c, 2) sums[r][c] = FMA(w, v[c], sums[r][c]);
            }
        }
        EACH(r, rows) EACH(c, 2) STOREU(t->out + r * t->stride + first + c * LANES, sums[r][c]);
    }
}

static TARGET void NAME(attend)(int rows, const block_tile *t) {
    switch (rows) {
        case 1: NAME(attend_rows)(1, t); break;
        case 2: NAME(attend_rows)(2, t); break;
        case 3: NAME(attend_rows)(3, t); break;
#if MOST > 3
        case 4: NAME(attend_rows)(4, t); break;
        case 5: NAME(attend_rows)(5, t); break;
        default: NAME(attend_rows)(6, t);
#endif
    }
}

#define BLOCK_WAY { MOST, sizeof(float), NULL, NULL, NAME(pack_keys), NAME(pack_values), NAME(attend) }
