/* Level `avx512bf16`: activations in bfloat16 by the instruction that adds products of pairs, 32 inputs at once. Codes
   are exact in bfloat16. Activations in float32 are multiplied as at level `avx512`. */
#include "products.h"

#ifdef __x86_64__
#define NAME(x) avx512bf16_##x
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#include "avx512.h"
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

INLINE TARGET __m512i widened(const uint8_t *p) {
    __m512 low = FROM_INT8(p), high = FROM_INT8(p + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
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

/* The lanes' scales: with groups of 32 the first eight lanes have one, the others the next. */
INLINE TARGET __m512 lane_scales(const uint16_t *scales, int64_t first, int64_t inputs, int64_t group) {
    if (group == 32) {
        const __m512i upper = _mm512_set_epi32(
            0x00010000, 0x00010000, 0x00010000, 0x00010000, 0x00010000, 0x00010000, 0x00010000, 0x00010000, 0, 0, 0, 0,
            0, 0, 0, 0);
        uint32_t both = 0;
        const uint16_t *at = scales + first / 32;
        if (first + 32 < inputs) memcpy(&both, at, 4);
        else both = *at;
        return (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper, _mm512_set1_epi32((int)both));
    }
    return _mm512_set1_ps(from_bfloat16(scales[first / group]));
}

typedef struct { const uint8_t *at[MORE_OUTPUTS]; } places;

INLINE TARGET void step(
    const int rows, const int outputs, const int kind, const tile *t, const places *p, int64_t first,
    __m512 sums[MOST][MORE_OUTPUTS]
) {
    if (kind == INT4) {
        EACH(pair, outputs / 2) {
            __m512i even[2], odd[2];
            __m512 scale[2];
            EACH(j, 2) {
                int o = 2 * pair + j;
                __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p->at[o]));
                even[j] = code_values(words), odd[j] = code_values(_mm512_srli_epi16(words, 4));
                scale[j] = lane_scales(t->scales[o], first, t->inputs, t->group);
            }
            EACH(r, rows) {
                const uint8_t *x = t->x[r] + 2 * first;
                EACH(j, 2) {
                    __m512 part = _mm512_dpbf16_ps(
                        _mm512_setzero_ps(), (__m512bh)even[j], (__m512bh)_mm512_load_si512(x));
                    part = _mm512_dpbf16_ps(part, (__m512bh)odd[j], (__m512bh)_mm512_load_si512(x + 64));
                    sums[r][2 * pair + j] = _mm512_fmadd_ps(part, scale[j], sums[r][2 * pair + j]);
                }
            }
        }
        return;
    }
    EACH(half, 2) {
        __m512i w[MORE_OUTPUTS];
        EACH(o, outputs) w[o] = kind == INT8 ? widened(p->at[o] + 32 * half) : _mm512_loadu_si512(p->at[o] + 64 * half);
        EACH(r, rows) {
            __m512i x = _mm512_load_si512(t->x[r] + 2 * first + 64 * half);
            EACH(o, outputs) sums[r][o] = _mm512_dpbf16_ps(sums[r][o], (__m512bh)w[o], (__m512bh)x);
        }
    }
}

/* A mask of so many bytes, of 64. */
INLINE uint64_t lowest(int64_t bytes) { return bytes >= 64 ? ~0ull : bytes > 0 ? (1ull << bytes) - 1 : 0; }

INLINE TARGET void multiply(const int rows, const int outputs, const int kind, const tile *t) {
    __m512 sums[MOST][MORE_OUTPUTS];
    EACH(r, rows) EACH(o, outputs) sums[r][o] = _mm512_setzero_ps();
    places p;
    EACH(o, outputs) p.at[o] = t->weights[o];
    const int step_bytes = (int)row_bytes(kind, STEP);
    int64_t first = 0;
    for (; first + STEP <= t->inputs; first += STEP) {
        if (step_bytes >= 64 || first % (2 * STEP) == 0) EACH(o, outputs) {
            __builtin_prefetch(p.at[o] + t->ahead, 0, 2);
            if (step_bytes == 128) __builtin_prefetch(p.at[o] + t->ahead + 64, 0, 2);
        }
        step(rows, outputs, kind, t, &p, first, sums);
        EACH(o, outputs) p.at[o] += step_bytes;
    }
    if (first < t->inputs) {
        uint8_t last[MORE_OUTPUTS][2 * STEP] __attribute__((aligned(64)));
        const int64_t bytes = row_bytes(kind, t->inputs - first);
        EACH(o, outputs) {
            _mm512_store_si512(last[o], _mm512_maskz_loadu_epi8(lowest(bytes), p.at[o]));
            _mm512_store_si512(last[o] + 64, _mm512_maskz_loadu_epi8(lowest(bytes - 64), p.at[o] + 64));
            p.at[o] = last[o];
        }
        step(rows, outputs, kind, t, &p, first, sums);
    }
    EACH(r, rows) for (int o = 0; o < outputs; o += OUTPUTS)
        avx512bf16_store_sums(sums[r] + o, t->out + r * t->stride + o);
}

#define DEFINE_TILE(kind, rows) \
    static TARGET void tile_##kind##_##rows(const tile *t) { multiply(rows, OUTPUTS, kind, t); }
#define DEFINE_MORE(kind, rows) \
    static TARGET void more_##kind##_##rows(const tile *t) { multiply(rows, MORE_OUTPUTS, kind, t); }
#define MORE_OF(kind) DEFINE_MORE(kind, 1) DEFINE_MORE(kind, 2)
TILES_OF(DEFINE_TILE, BFLOAT16)
TILES_OF(DEFINE_TILE, INT8)
TILES_OF(DEFINE_TILE, INT4)
MORE_OF(BFLOAT16)
MORE_OF(INT8)
MORE_OF(INT4)

#define SIX(kind) { tile_##kind##_1, tile_##kind##_2, tile_##kind##_3, tile_##kind##_4, tile_##kind##_5, tile_##kind##_6 }
#define MORE(kind) { more_##kind##_1, more_##kind##_2 }
const way avx512bf16_narrow[KINDS] = {
    [BFLOAT16] = { SIX(BFLOAT16), 6, 2, 0, MORE(BFLOAT16) },
    [INT8] = { SIX(INT8), 6, 2, 0, MORE(INT8) },
    [INT4] = { SIX(INT4), 6, 2, 64, MORE(INT4) },
};
#endif
