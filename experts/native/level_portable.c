/* Level `portable`: eight float32 lanes of whatever the compiler has, every operation rounded by itself. */
#include "products.h"

#define NAME(x) portable_##x
#define TARGET
#define LANES 8
#define MOST 3
typedef float lanes __attribute__((vector_size(32)));
typedef float loose_lanes __attribute__((vector_size(32), aligned(1), may_alias));
#define V lanes
#define ZERO() ((lanes){0})
#define LOAD(p) (*(const loose_lanes *)(p))
#define LOADU(p) (*(const loose_lanes *)(p))
#define STOREU(p, values) (*(loose_lanes *)(p) = (values))
#define FMA(a, b, c) ((c) + (a) * (b))
#define FMA1(a, b, c) ((c) + (a) * (b))
#define FILLED(value) ((lanes){0} + (value))
#define TILES_OF(M, kind) M(kind, 1) M(kind, 2) M(kind, 3)

#define CONVERTER(name, expression)                             \
    INLINE lanes name(const uint8_t *p) {                       \
        lanes values;                                           \
        for (int i = 0; i < LANES; i++) values[i] = expression; \
        return values;                                          \
    }
CONVERTER(LOW_HALVES, from_bfloat16((uint16_t)(p[4 * i] | p[4 * i + 1] << 8)))
CONVERTER(HIGH_HALVES, from_bfloat16((uint16_t)(p[4 * i + 2] | p[4 * i + 3] << 8)))
CONVERTER(FROM_INT8, (float)(int8_t)p[i])
CONVERTER(LOW_CODES, (float)((int)(p[i] & 15) - 8))
CONVERTER(HIGH_CODES, (float)((int)(p[i] >> 4) - 8))

INLINE void portable_store_sums(const lanes sums[OUTPUTS], float *out) {
    for (int o = 0; o < OUTPUTS; o++) {
        lanes s = sums[o];
        out[o] = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
    }
}

#include "lanes.h"
#include "rows.h"
#include "draws.h"
#include "blocks.h"

#define THREE(kind) { portable_tile_##kind##_1, portable_tile_##kind##_2, portable_tile_##kind##_3 }
#define NARROW_WAYS \
    [BFLOAT16] = { THREE(BFLOAT16), 3, 4, 16 }, [INT8] = { THREE(INT8), 3, 4, 0 }, [INT4] = { THREE(INT4), 3, 4, 16 }
static const way narrow[KINDS] = { NARROW_WAYS };
static const way wide[KINDS] = { [FLOAT32] = { THREE(FLOAT32), 3, 4, 0 }, NARROW_WAYS };
static const block_way blocks = BLOCK_WAY;
const level portable_level = {
    narrow, wide, portable_silu_times, portable_snake_row, portable_square_sum, portable_scale, portable_softmax, portable_read_row, portable_store_row, portable_rotate,
    portable_add_sums, portable_mix_rows, portable_add_gated, portable_find_largest, portable_largest_logit, portable_weigh_row, { &blocks, &blocks },
};
