/* Sixteen lanes: what both levels with AVX-512 share. */
#include <immintrin.h>

#define LANES 16
#define MOST 6
#define V __m512
#define ZERO() _mm512_setzero_ps()
#define LOAD(p) _mm512_load_ps(p)
#define LOADU(p) _mm512_loadu_ps(p)
#define STOREU(p, values) _mm512_storeu_ps(p, values)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define FMA1(a, b, c) __builtin_fmaf(a, b, c)
#define FILLED(value) _mm512_set1_ps(value)
#define LOW_HALVES(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))
#define HIGH_HALVES(p) \
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)))
#define FROM_INT8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define BYTES(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define CODES() _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
#define LOW_CODES(p) _mm512_permutexvar_ps(BYTES(p), CODES())
#define HIGH_CODES(p) _mm512_permutexvar_ps(_mm512_srli_epi32(BYTES(p), 4), CODES())
#define TILES_OF(M, kind) M(kind, 1) M(kind, 2) M(kind, 3) M(kind, 4) M(kind, 5) M(kind, 6)

/* Adds up four vectors, each in the same order of lanes. */
INLINE TARGET void NAME(store_sums)(const __m512 sums[OUTPUTS], float *out) {
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m128 left = _mm_add_ps(_mm512_castps512_ps128(four), _mm512_extractf32x4_ps(four, 1));
    __m128 right = _mm_add_ps(_mm512_extractf32x4_ps(four, 2), _mm512_extractf32x4_ps(four, 3));
    _mm_storeu_ps(out, _mm_add_ps(left, right));
}
