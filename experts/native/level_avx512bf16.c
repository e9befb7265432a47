/* Level `avx512bf16`: activations in bfloat16. With weights in bfloat16 and int4, whose codes are exact in it, 32 inputs at
   once by the instruction that adds products of pairs; with int8 activations become whole numbers of two bytes, and 64
   codes at once are multiplied by each. Activations in float32 are multiplied as at level `avx512`. */
#include "products.h"

#include <stdbool.h>

#ifdef __x86_64__
#define NAME(x) avx512bf16_##x
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")))
#include "avx512.h"
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)
#define BLOCK_INPUTS 128 /* of int8 and int4 */
#define FEW_FLOATS 2     /* rows that take outputs one by one; codes ahead of them are asked for, floats come by themselves */
#define FEW_CODES 1

/* A mask of so many bytes, of 64. */
INLINE uint64_t lowest(int64_t bytes) { return bytes >= 64 ? ~0ull : bytes > 0 ? (1ull << bytes) - 1 : 0; }

/* Where a tile stands in its outputs' rows, which lie `stride` bytes apart, `scale_stride` scales. */
typedef struct {
    const uint8_t *at;
    int64_t stride;
    const uint16_t *scales;
    int64_t scale_stride;
} place;

INLINE TARGET void step_floats(
    const int rows, const int outputs, const tile *t, const place *p, int64_t first, __m512 sums[MOST][OUTPUTS]
) {
    EACH(half, 2) {
        __m512i w[OUTPUTS];
        EACH(o, outputs) w[o] = _mm512_loadu_si512(p->at + o * p->stride + 64 * half);
        EACH(r, rows) {
            __m512i x = _mm512_load_si512(t->x[r] + 2 * first + 64 * half);
            EACH(o, outputs) sums[r][o] = _mm512_dpbf16_ps(sums[r][o], (__m512bh)w[o], (__m512bh)x);
        }
    }
}

/* A block's activations as pack_fixed leaves them: 128 high bytes, 128 low ones, what lanes begin with, the unit. */
INLINE TARGET void step_int8(
    const int rows, const int outputs, const tile *t, const place *p, int64_t first, __m512 sums[MOST][OUTPUTS]
) {
    const __m512i turned = _mm512_set1_epi8((char)0x80);
    __m512i a[OUTPUTS], b[OUTPUTS];
    EACH(o, outputs) {
        const uint8_t *at = p->at + o * p->stride;
        a[o] = _mm512_loadu_si512(at), b[o] = _mm512_loadu_si512(at + 64);
    }
    EACH(r, rows) {
        const uint8_t *at = t->x[r] + 3 * first;
        __m512i sum[OUTPUTS], x = _mm512_load_si512(at), start = _mm512_load_si512(at + 256);
        EACH(o, outputs) sum[o] = _mm512_dpbusd_epi32(start, _mm512_xor_si512(a[o], turned), x);
        x = _mm512_load_si512(at + 64);
        EACH(o, outputs) sum[o] = _mm512_dpbusd_epi32(sum[o], _mm512_xor_si512(b[o], turned), x);
        x = _mm512_load_si512(at + 128);
        EACH(o, outputs) sum[o] = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum[o], 8), x, a[o]);
        x = _mm512_load_si512(at + 192);
        EACH(o, outputs) sum[o] = _mm512_dpbusd_epi32(sum[o], x, b[o]);
        const __m512 unit = _mm512_load_ps(at + 320);
        EACH(o, outputs) sums[r][o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[o]), unit, sums[r][o]);
    }
}

/* bfloat16 of the code in the low four bits of each word, whose fifth bit may be anything. */
INLINE TARGET __m512i code_values(__m512i words) {
    const __m512i values = _mm512_set_epi16(
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0x0000, (short)0xbf80, (short)0xc000, (short)0xc040,
        (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0, (short)0xc100,
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0x0000, (short)0xbf80, (short)0xc000, (short)0xc040,
        (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0, (short)0xc100);
    return _mm512_permutexvar_epi16(words, values);
}

/* A block's scales in the lanes that they are of: lane i has inputs 8 i to 8 i + 7. */
INLINE TARGET __m512 lane_scales(const uint16_t *scales, const int group) {
    const __m512i sources = group == 32 ? _mm512_set_epi32(
        0x30000, 0x30000, 0x30000, 0x30000, 0x20000, 0x20000, 0x20000, 0x20000, 0x10000, 0x10000, 0x10000, 0x10000,
        0, 0, 0, 0) : _mm512_set_epi32(
        0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0x10000, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512i spread;
    if (group == 32) spread = _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)scales));
    else if (group == 64) spread = _mm512_broadcastd_epi32(_mm_maskz_loadu_epi16(3, scales));
    else return (__m512)_mm512_maskz_broadcastw_epi16(0xaaaaaaaa, _mm_maskz_loadu_epi16(1, scales));
    return (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, sources, spread);
}

INLINE TARGET void step_int4(
    const int rows, const int outputs, const int group, const tile *t, const place *p, int64_t first,
    __m512 sums[MOST][OUTPUTS]
) {
    EACH(o, outputs) {
        const __m512i words = _mm512_loadu_si512(p->at + o * p->stride);
        const __m512i a = code_values(words), b = code_values(_mm512_srli_epi16(words, 4));
        const __m512i c = code_values(_mm512_srli_epi16(words, 8)), d = code_values(_mm512_srli_epi16(words, 12));
        const __m512 scale = lane_scales(p->scales + o * p->scale_stride, group);
        EACH(r, rows) {
            const uint8_t *x = t->x[r] + 2 * first;
            __m512 part = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)a, (__m512bh)_mm512_load_si512(x));
            part = _mm512_dpbf16_ps(part, (__m512bh)b, (__m512bh)_mm512_load_si512(x + 64));
            part = _mm512_dpbf16_ps(part, (__m512bh)c, (__m512bh)_mm512_load_si512(x + 128));
            part = _mm512_dpbf16_ps(part, (__m512bh)d, (__m512bh)_mm512_load_si512(x + 192));
            sums[r][o] = _mm512_fmadd_ps(part, scale, sums[r][o]);
        }
    }
}

INLINE TARGET void step(
    const int rows, const int outputs, const int kind, const int group, const tile *t, const place *p, int64_t first,
    __m512 sums[MOST][OUTPUTS]
) {
    if (kind == BFLOAT16) step_floats(rows, outputs, t, p, first, sums);
    else if (kind == INT8) step_int8(rows, outputs, t, p, first, sums);
    else step_int4(rows, outputs, group, t, p, first, sums);
}

/* The step behind the last whole one: what is missing is zero. */
INLINE TARGET void last_step(
    const int rows, const int outputs, const int kind, const int group, const tile *t, place p, int64_t first,
    __m512 sums[MOST][OUTPUTS]
) {
    uint8_t last[OUTPUTS][128] __attribute__((aligned(64)));
    uint16_t scales[OUTPUTS][4] = {0};
    const int64_t bytes = row_bytes(kind, t->inputs - first);
    EACH(o, outputs) {
        const uint8_t *at = p.at + o * p.stride;
        _mm512_store_si512(last[o], _mm512_maskz_loadu_epi8(lowest(bytes), at));
        _mm512_store_si512(last[o] + 64, _mm512_maskz_loadu_epi8(lowest(bytes - 64), at + 64));
        if (kind == INT4)
            memcpy(scales[o], p.scales + o * p.scale_stride, (size_t)((t->inputs - first + group - 1) / group) * 2);
    }
    step(rows, outputs, kind, group, t, &(place){last[0], sizeof last[0], scales[0], 4}, first, sums);
}

/* together: outputs at once. */
INLINE TARGET void multiply(const int rows, const int kind, const int group, const int together, const tile *t) {
    const int step_inputs = kind == BFLOAT16 ? STEP : BLOCK_INPUTS, step_bytes = (int)row_bytes(kind, step_inputs);
    const uint8_t *soon = t->soon;
    for (int64_t output = 0; output < t->outputs; output += OUTPUTS) {
        __m512 sums[OUTPUTS][MOST][OUTPUTS];
        _Pragma("GCC unroll 1") for (int from = 0; from < OUTPUTS; from += together) {
            __m512 some[MOST][OUTPUTS];
            EACH(r, rows) EACH(o, together) some[r][o] = _mm512_setzero_ps();
            const int64_t at = output + from;
            place p = {t->weights + at * t->row_bytes, t->row_bytes, t->scales + at * t->row_scales, t->row_scales};
            int64_t first = 0;
            for (; first + step_inputs <= t->inputs; first += step_inputs) {
                if (soon) soon = ask_for(soon, together * step_bytes);
                step(rows, together, kind, group, t, &p, first, some);
                p.at += step_bytes;
                if (kind == INT4) p.scales += BLOCK_INPUTS / group;
            }
            if (first < t->inputs) last_step(rows, together, kind, group, t, p, first, some);
            EACH(r, rows) EACH(o, together) sums[from][r][o] = some[r][o];
        }
        EACH(r, rows) {
            __m512 four[OUTPUTS];
            EACH(o, OUTPUTS) four[o] = together > 1 ? sums[0][r][o] : sums[o][r][0];
            avx512bf16_store_sums(four, t->out + r * t->stride + output);
        }
    }
}

INLINE TARGET void multiply_grouped(const int rows, const int kind, const int together, const tile *t) {
    if (kind != INT4) multiply(rows, kind, 0, together, t);
    else if (t->group == 32) multiply(rows, INT4, 32, together, t);
    else if (t->group == 64) multiply(rows, INT4, 64, together, t);
    else multiply(rows, INT4, 128, together, t);
}

/* Few activations take one output after the other, so that weights come from memory in one stream, which is the fastest;
   more take outputs together, so that each of their inputs is loaded once for all. So do few where weights' rows are
   short: four of them are one stream, too, and one alone would be over before its first products are added up. */
INLINE TARGET void multiply_ordered(const int rows, const int kind, const tile *t) {
    if (rows <= (kind == BFLOAT16 ? FEW_FLOATS : FEW_CODES) && row_bytes(kind, t->inputs) > SHORT_ROW)
        multiply_grouped(rows, kind, 1, t);
    else multiply_grouped(rows, kind, OUTPUTS, t);
}

/* 32 inputs, zeros behind the last of count. */
INLINE TARGET __m512i words_at(const void *from, int64_t first, int64_t count) {
    return _mm512_maskz_loadu_epi16((__mmask32)lowest(count - first), (const uint16_t *)from + first);
}

/* Of int8: inputs as whole numbers of a unit in which the block's largest has 15 bits. Of each, in bytes: its high one,
   signed, and its low one, unsigned. step_int8 multiplies high bytes with codes to which 128 is added, as the instruction
   wants one factor unsigned; what lanes begin with takes that away again. A block with no number for a value has the unit
   NaN. */
static TARGET void pack_fixed(const void *from, uint8_t *to, int64_t count) {
    for (int64_t first = 0; first < count; first += BLOCK_INPUTS, to += 3 * BLOCK_INPUTS) {
        __m512i words[4], most = _mm512_setzero_si512();
        EACH(i, 4) {
            words[i] = words_at(from, first + 32 * i, count);
            most = _mm512_max_epu16(most, _mm512_and_si512(words[i], _mm512_set1_epi16(0x7fff)));
        }
        most = _mm512_max_epu32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
        const int largest = (int)_mm512_reduce_max_epu32(most) >> 7; /* exponent, with bfloat16's offset of 127 */
        const bool is_number = largest < 255;
        const int exponent = largest < 32 ? 32 : largest; /* below it a unit would not be a normal number */
        const __m512i factor = _mm512_set1_epi32(is_number ? (268 - exponent) << 23 : 0); /* 2^14 / 2^exponent */
        EACH(i, 8) {
            const __m512i pair = words[i / 2];
            const __m256i half = i % 2 ? _mm512_extracti64x4_epi64(pair, 1) : _mm512_castsi512_si256(pair);
            const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_castsi512_ps(factor)));
            _mm_store_si128((__m128i *)(to + 16 * i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 8)));
            _mm_store_si128((__m128i *)(to + 128 + 16 * i), _mm512_cvtepi32_epi8(whole));
        }
        __m512i added = _mm512_setzero_si512();
        EACH(i, 2) added = _mm512_dpbusd_epi32(added, _mm512_set1_epi8((char)0x80), _mm512_load_si512(to + 64 * i));
        _mm512_store_si512(to + 256, _mm512_sub_epi32(_mm512_setzero_si512(), added));
        _mm512_store_si512(to + 320, _mm512_set1_epi32(is_number ? (exponent - 14) << 23 : 0x7fc00000));
    }
}

/* Of int4: of each four inputs the first ones, then the second, third and fourth ones. */
static TARGET void pack_fourths(const void *from, uint8_t *to, int64_t count) {
    for (int64_t first = 0; first < count; first += BLOCK_INPUTS, to += 2 * BLOCK_INPUTS)
        EACH(i, 4) {
            const __m512i words = words_at(from, first + 32 * i, count);
            EACH(k, 4)
                _mm_store_si128(
                    (__m128i *)(to + 64 * k + 16 * i), _mm512_cvtepi64_epi16(_mm512_srli_epi64(words, 16 * k)));
        }
}

#define DEFINE_TILE(kind, rows) \
    static TARGET void tile_##kind##_##rows(const tile *t) { multiply_ordered(rows, kind, t); }
TILES_OF(DEFINE_TILE, BFLOAT16)
TILES_OF(DEFINE_TILE, INT4)
DEFINE_TILE(INT8, 1) DEFINE_TILE(INT8, 2) DEFINE_TILE(INT8, 3) DEFINE_TILE(INT8, 4)

#define FOUR(kind) tile_##kind##_1, tile_##kind##_2, tile_##kind##_3, tile_##kind##_4
#define SIX(kind) FOUR(kind), tile_##kind##_5, tile_##kind##_6
const way avx512bf16_narrow[KINDS] = {
    [BFLOAT16] = { { SIX(BFLOAT16) }, 6, 2, 0, 0, FEW_FLOATS, NULL },
    [INT8] = { { FOUR(INT8) }, 4, 3, 0, BLOCK_INPUTS, 0, pack_fixed },
    [INT4] = { { SIX(INT4) }, 6, 2, 0, BLOCK_INPUTS, 0, pack_fourths },
};
#endif
