/* Products with float32 activations in LANES lanes, for one level. Included by each level's file, which defines
   NAME(x), TARGET, LANES, MOST, V and the operations on it. A (row, output) pair has one vector of sums, to which
   inputs are added in one order whatever the tile's number of rows; STEP is a multiple of two vectors at every level. */

/* Where a tile stands: weights and scales of output o are o times the tile's strides further. */
typedef struct { const uint8_t *at; int64_t stride; const uint16_t *scales; int64_t row_scales; } NAME(place);

#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

/* W: the weights of output o, at input i of the step, as a vector; k: the packed activation that they meet. */
#define ADD_PRODUCTS(W, k)                                                     \
    do {                                                                       \
        V w[OUTPUTS];                                                          \
        EACH(o, OUTPUTS) w[o] = (W);                                           \
        EACH(r, rows) {                                                        \
            V x = LOAD((const float *)t->x[r] + first + (k));                  \
            EACH(o, OUTPUTS) sums[r][o] = FMA(w[o], x, sums[r][o]);            \
        }                                                                      \
    } while (0)

/* count: inputs, STEP or half of it. */
INLINE TARGET void NAME(step)(
    const int rows, const int kind, const int count, const tile *t, const NAME(place) *p, int64_t first,
    V sums[MOST][OUTPUTS]
) {
    if (kind == FLOAT32) {
        EACH(i, count / LANES) ADD_PRODUCTS(LOADU((const float *)(p->at + o * p->stride) + i * LANES), i * LANES);
    } else if (kind == BFLOAT16) {
        EACH(i, count / LANES / 2) {
            ADD_PRODUCTS(LOW_HALVES(p->at + o * p->stride + 4 * i * LANES), 2 * i * LANES);
            ADD_PRODUCTS(HIGH_HALVES(p->at + o * p->stride + 4 * i * LANES), 2 * i * LANES + LANES);
        }
    } else if (kind == INT8) {
        EACH(i, count / LANES) ADD_PRODUCTS(FROM_INT8(p->at + o * p->stride + i * LANES), i * LANES);
    } else {
        EACH(half, count / (STEP / 2)) {
            V parts[MOST][OUTPUTS];
            EACH(r, rows) EACH(o, OUTPUTS) parts[r][o] = ZERO();
            EACH(i, STEP / LANES / 4) {
                int at = half * (STEP / 2) + 2 * i * LANES;
                V (*sums)[OUTPUTS] = parts;
                ADD_PRODUCTS(LOW_CODES(p->at + o * p->stride + at / 2), at);
                ADD_PRODUCTS(HIGH_CODES(p->at + o * p->stride + at / 2), at + LANES);
            }
            int64_t group = (first + half * (STEP / 2)) / t->group;
            if (half && first + STEP / 2 >= t->inputs) break;  /* a short row has no such group */
            EACH(o, OUTPUTS) {
                V scale = FILLED(from_bfloat16(p->scales[o * p->row_scales + group]));
                EACH(r, rows) sums[r][o] = FMA(parts[r][o], scale, sums[r][o]);
            }
        }
    }
}

INLINE TARGET void NAME(tile)(const int rows, const int kind, const tile *t) {
    const int64_t step_bytes = row_bytes(kind, STEP), bytes = row_bytes(kind, t->inputs);
    const uint8_t *soon = t->soon;
    for (int64_t output = 0; output < t->outputs; output += OUTPUTS) {
        V sums[MOST][OUTPUTS];
        EACH(r, rows) EACH(o, OUTPUTS) sums[r][o] = ZERO();
        NAME(place) place = {
            t->weights + output * t->row_bytes, t->row_bytes, t->scales + output * t->row_scales, t->row_scales
        };
        int64_t first = 0;
        for (; first + STEP <= t->inputs; first += STEP) {
            if (soon) soon = ask_for(soon, OUTPUTS * step_bytes);
            NAME(step)(rows, kind, STEP, t, &place, first, sums);
            place.at += step_bytes;
        }
        if (first + STEP / 2 <= t->inputs) {
            NAME(step)(rows, kind, STEP / 2, t, &place, first, sums);
            place.at += step_bytes / 2;
            first += STEP / 2;
        }
        if (first < t->inputs) {
            uint8_t last[OUTPUTS][2 * STEP] __attribute__((aligned(64)));
            memset(last, 0, sizeof last);
            EACH(o, OUTPUTS)
                memcpy(last[o], place.at + o * place.stride, (size_t)(bytes - row_bytes(kind, first)));
            place.at = last[0], place.stride = sizeof last[0];
            NAME(step)(rows, kind, STEP / 2, t, &place, first, sums);
        }
        EACH(r, rows) NAME(store_sums)(sums[r], t->out + r * t->stride + output);
    }
}

#define DEFINE_TILE(kind, rows) \
    static TARGET void NAME(tile_##kind##_##rows)(const tile *t) { NAME(tile)(rows, kind, t); }
#define DEFINE_TILES(kind) TILES_OF(DEFINE_TILE, kind)
DEFINE_TILES(FLOAT32)
DEFINE_TILES(BFLOAT16)
DEFINE_TILES(INT8)
DEFINE_TILES(INT4)

/* e^x = 2^n * e^r with n = round(x / ln 2) and |r| <= ln 2 / 2: this is e^r, by Taylor's polynomial to the eighth power. */
INLINE TARGET float NAME(exponential)(float x, float n) {
    float r = FMA1(n, -0.693359375f, x);
    r = FMA1(n, 2.12194440e-4f, r);
    float e = FMA1(r, 2.48015873e-5f, 1.98412698e-4f);
    e = FMA1(e, r, 1.38888889e-3f);
    e = FMA1(e, r, 8.33333333e-3f);
    e = FMA1(e, r, 4.16666667e-2f);
    e = FMA1(e, r, 1.66666667e-1f);
    e = FMA1(e, r, 0.5f);
    e = FMA1(e, r, 1.0f);
    return FMA1(e, r, 1.0f);
}

/* 1 + e^-gate, by which what a sigmoid scales is divided. Element by element in basic operations, so that no element's bits
   depend on its place. */
INLINE TARGET float NAME(sigmoid_divisor)(float gate) {
    float x = -gate;
    x = x > 89.0f ? 89.0f : x; /* the power is then infinite, and the result 0 */
    x = x < -87.0f ? -87.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const int32_t bits = ((int32_t)(n == n ? n : 0.0f) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return FMA1(NAME(exponential)(x, n), power, 1.0f);
}

INLINE TARGET float NAME(silu)(float gate) { return gate / NAME(sigmoid_divisor)(gate); }

static TARGET void NAME(silu_times)(const float *gate, const float *up, float *out, int64_t count, int is_narrow) {
    if (is_narrow)
        for (int64_t i = 0; i < count; i++) out[i] = rounded(rounded(NAME(silu)(rounded(gate[i]))) * rounded(up[i]));
    else
        for (int64_t i = 0; i < count; i++) out[i] = NAME(silu)(gate[i]) * up[i];
}

/* x + sin(x * frequency)^2 * magnitude. The square has the period pi, of which a third part makes up for what the first two
   leave out: what is left of y is within pi / 2, where Taylor's polynomial to the eleventh power is off by 6e-8. So far from
   0 that nothing is left of it, it is taken for 0; what is infinite gives no number. */
INLINE TARGET float NAME(snake)(float x, float frequency, float magnitude) {
    const float y = x * frequency;
    const float n = (y * 0.318309886f + 12582912.0f) - 12582912.0f;
    float r = FMA1(n, -3.140625f, y);
    r = FMA1(n, -9.67502594e-4f, r);
    r = FMA1(n, -1.50995799e-7f, r);
    r = y < 1e6f && y > -1e6f ? r : y - y;
    const float s = r * r;
    float sine = FMA1(s, -2.50521084e-8f, 2.75573192e-6f);
    sine = FMA1(sine, s, -1.98412698e-4f);
    sine = FMA1(sine, s, 8.33333333e-3f);
    sine = FMA1(sine, s, -1.66666667e-1f);
    sine = FMA1(sine * s, r, r);
    return FMA1(sine * sine, magnitude, x);
}

static TARGET void NAME(snake_row)(
    const float *x, const float *bias, const float *frequency, const float *magnitude, float *out, int64_t count
) {
    for (int64_t i = 0; i < count; i++) out[i] = NAME(snake)(x[i] + bias[i], frequency[i], magnitude[i]);
}
