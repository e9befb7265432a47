/* What attention and norms do with rows of float32, for one level. Included after lanes.h. An element's bits depend on
   its row alone. */

static TARGET void NAME(read_row)(int is_narrow, const uint8_t *from, float *to, int64_t count) {
    if (!is_narrow) memcpy(to, from, (size_t)count * 4);
    else
        for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(((const uint16_t *)from)[i]);
}

static TARGET void NAME(store_row)(int is_narrow, const float *values, uint8_t *out, int64_t count) {
    if (!is_narrow) memcpy(out, values, (size_t)count * 4);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[i] = to_bfloat16(values[i]);
}

/* Pairs (i, i + half), as rotary embeddings do. */
static TARGET void NAME(rotate)(const float *x, const float *cos, const float *sin, float *to, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        to[i] = x[i] * cos[i] - x[half + i] * sin[i];
        to[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
    }
}

/* Of squares, in sixteen sums whatever the level's lanes are. */
static TARGET float NAME(square_sum)(const float *x, int64_t count) {
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += x[i + lane] * x[i + lane];
    for (int lane = 0; i + lane < count; lane++) sums[lane] += x[i + lane] * x[i + lane];
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    return sums[0];
}

/* x * factor * weight; is_narrow: both products are rounded to bfloat16, as the published models do. */
static TARGET void NAME(scale)(float *x, const float *weight, float factor, int64_t count, int is_narrow) {
    if (is_narrow)
        for (int64_t i = 0; i < count; i++) x[i] = rounded(rounded(x[i] * factor) * weight[i]);
    else
        for (int64_t i = 0; i < count; i++) x[i] = x[i] * factor * weight[i];
}

/* Softmax in place, its sum in sixteen sums; count is a multiple of 16. Below e^-87 of the largest it is 0. */
static TARGET void NAME(softmax)(float *x, int64_t count) {
    float sums[16] = {0}, most[16];
    for (int lane = 0; lane < 16; lane++) most[lane] = x[lane];
    for (int64_t i = 16; i < count; i += 16)
        for (int lane = 0; lane < 16; lane++) {
            const float y = x[i + lane];
            most[lane] = y > most[lane] || y != y ? y : most[lane];
        }
    float largest = most[0]; /* what is no number stays the largest */
    for (int lane = 1; lane < 16; lane++)
        largest = most[lane] > largest || most[lane] != most[lane] ? most[lane] : largest;
    for (int64_t i = 0; i < count; i += 16)
        for (int lane = 0; lane < 16; lane++) {
            float y = x[i + lane] - largest;
            const int is_seen = y >= -87.0f;
            y = is_seen ? y : 0.0f;
            const float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
            const float e = NAME(exponential)(y, n);
            const int32_t bits = ((int32_t)n + 127) << 23;
            float power;
            memcpy(&power, &bits, 4);
            x[i + lane] = is_seen ? e * power : 0.0f;
            sums[lane] += x[i + lane];
        }
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    for (int64_t i = 0; i < count; i++) x[i] /= sums[0];
}

/* out = row + sums, in the rows' dtype, to which the sums are rounded before. */
static TARGET void NAME(add_sums)(const uint8_t *row, const float *sums, uint8_t *out, int64_t count, int is_narrow) {
    if (is_narrow) {
        const uint16_t *words = (const uint16_t *)row;
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)out)[i] = to_bfloat16(from_bfloat16(words[i]) + rounded(sums[i]));
    } else
        for (int64_t i = 0; i < count; i++) ((float *)out)[i] = ((const float *)row)[i] + sums[i];
}

/* out = weights[0] * rows[0] + weights[1] * rows[1] + ..., in this order: one product and one addition a row, each
   rounded to float32. */
static TARGET void NAME(mix_rows)(
    int64_t num_rows, const uint8_t *const *rows, const float *weights, float *out, int64_t count, int is_narrow
) {
    for (int64_t k = 0; k < num_rows; k++) {
        const float w = weights[k];
        const uint16_t *words = (const uint16_t *)rows[k];
        const float *values = (const float *)rows[k];
        if (is_narrow && k) for (int64_t i = 0; i < count; i++) out[i] = out[i] + w * from_bfloat16(words[i]);
        else if (is_narrow) for (int64_t i = 0; i < count; i++) out[i] = w * from_bfloat16(words[i]);
        else if (k) for (int64_t i = 0; i < count; i++) out[i] = out[i] + w * values[i];
        else for (int64_t i = 0; i < count; i++) out[i] = w * values[i];
    }
}

/* sums + row / (1 + e^-gate) with one gate: an addition and a division an element. */
static TARGET void NAME(add_gated)(const uint8_t *row, float gate, float *sums, int64_t count, int is_narrow) {
    const float divisor = NAME(sigmoid_divisor)(gate);
    const uint16_t *words = (const uint16_t *)row;
    const float *values = (const float *)row;
    if (is_narrow) for (int64_t i = 0; i < count; i++) sums[i] = sums[i] + from_bfloat16(words[i]) / divisor;
    else for (int64_t i = 0; i < count; i++) sums[i] = sums[i] + values[i] / divisor;
}

/* The first of the largest values; -1 where one is not finite. */
static TARGET int64_t NAME(find_largest)(const float *x, int64_t count) {
    float most[16], bad[16] = {0};
    for (int lane = 0; lane < 16; lane++) most[lane] = x[0];
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int lane = 0; lane < 16; lane++) {
            most[lane] = x[i + lane] > most[lane] ? x[i + lane] : most[lane];
            bad[lane] += x[i + lane] * 0.0f; /* not a number for what is not finite, else 0 */
        }
    for (int lane = 0; i + lane < count; lane++) {
        most[lane] = x[i + lane] > most[lane] ? x[i + lane] : most[lane];
        bad[lane] += x[i + lane] * 0.0f;
    }
    for (int lane = 1; lane < 16; lane++) {
        most[0] = most[lane] > most[0] ? most[lane] : most[0];
        bad[0] += bad[lane];
    }
    if (bad[0] != bad[0]) return -1;
    int64_t found = 0;
    while (x[found] != most[0]) found++;
    return found;
}
