/* Level `avx512`: sixteen float32 lanes. */
#include "products.h"

#ifdef __x86_64__
#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "avx512.h"
#include "lanes.h"
#include "rows.h"
#include "draws.h"
#include "blocks.h"

#define SIX(kind) { avx512_tile_##kind##_1, avx512_tile_##kind##_2, avx512_tile_##kind##_3, \
                    avx512_tile_##kind##_4, avx512_tile_##kind##_5, avx512_tile_##kind##_6 }
#define NARROW_WAYS \
    [BFLOAT16] = { SIX(BFLOAT16), 6, 4, 32 }, [INT8] = { SIX(INT8), 6, 4, 0 }, [INT4] = { SIX(INT4), 3, 4, 32 }
static const way narrow[KINDS] = { NARROW_WAYS };
static const way wide[KINDS] = { [FLOAT32] = { SIX(FLOAT32), 6, 4, 0 }, NARROW_WAYS };
#define ROW_WORK avx512_silu_times, avx512_snake_row, avx512_square_sum, avx512_scale, avx512_softmax, avx512_read_row, avx512_store_row, avx512_rotate, \
                 avx512_add_sums, avx512_mix_rows, avx512_add_gated, avx512_find_largest, avx512_largest_logit, avx512_weigh_row
static const block_way blocks = BLOCK_WAY;
const level avx512_level = { narrow, wide, ROW_WORK, { &blocks, &blocks } };
const level avx512bf16_level = { avx512bf16_narrow, wide, ROW_WORK, { &blocks, &avx512bf16_blocks } };
#endif
