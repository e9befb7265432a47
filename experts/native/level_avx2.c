/* Level `avx2`: eight float32 lanes with fused multiply-add. */
#include "products.h"

#ifdef __x86_64__
#include <immintrin.h>

#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define MOST 3
#define V __m256
#define ZERO() _mm256_setzero_ps()
#define LOAD(p) _mm256_load_ps(p)
#define LOADU(p) _mm256_loadu_ps(p)
#define STOREU(p, values) _mm256_storeu_ps(p, values)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FMA1(a, b, c) __builtin_fmaf(a, b, c)
#define FILLED(value) _mm256_set1_ps(value)
#define WORDS(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOW_HALVES(p) _mm256_castsi256_ps(_mm256_slli_epi32(WORDS(p), 16))
#define HIGH_HALVES(p) _mm256_castsi256_ps(_mm256_and_si256(WORDS(p), _mm256_set1_epi32((int)0xffff0000)))
#define EIGHT_BYTES(p) _mm_loadl_epi64((const __m128i *)(p))
#define FROM_INT8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(EIGHT_BYTES(p)))
#define BYTES(p) _mm256_cvtepu8_epi32(EIGHT_BYTES(p))
#define VALUES(codes) _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)))
#define LOW_CODES(p) VALUES(_mm256_and_si256(BYTES(p), _mm256_set1_epi32(15)))
#define HIGH_CODES(p) VALUES(_mm256_srli_epi32(BYTES(p), 4))
#define TILES_OF(M, kind) M(kind, 1) M(kind, 2) M(kind, 3)

INLINE TARGET void avx2_store_sums(const __m256 sums[OUTPUTS], float *out) {
    __m256 a = _mm256_hadd_ps(sums[0], sums[1]), b = _mm256_hadd_ps(sums[2], sums[3]);
    __m256 four = _mm256_hadd_ps(a, b);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
}

#include "lanes.h"
#include "rows.h"
#include "draws.h"
#include "blocks.h"

#define THREE(kind) { avx2_tile_##kind##_1, avx2_tile_##kind##_2, avx2_tile_##kind##_3 }
#define NARROW_WAYS \
    [BFLOAT16] = { THREE(BFLOAT16), 3, 4, 16 }, [INT8] = { THREE(INT8), 3, 4, 0 }, [INT4] = { THREE(INT4), 3, 4, 16 }
static const way narrow[KINDS] = { NARROW_WAYS };
static const way wide[KINDS] = { [FLOAT32] = { THREE(FLOAT32), 3, 4, 0 }, NARROW_WAYS };
static const block_way blocks = BLOCK_WAY;
const level avx2_level = {
    narrow, wide, avx2_silu_times, avx2_snake_row, avx2_square_sum, avx2_scale, avx2_softmax, avx2_read_row, avx2_store_row, avx2_rotate, avx2_add_sums,
    avx2_mix_rows, avx2_add_gated, avx2_find_largest, avx2_largest_logit, avx2_weigh_row, { &blocks, &blocks },
};
#endif
