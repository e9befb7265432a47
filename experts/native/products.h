/* What the parts of the library share: kinds of weights, and one tile of a product. */
#ifndef SAGE_PRODUCTS_H
#define SAGE_PRODUCTS_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define OUTPUTS 4  /* of a tile */
#define MOST_ROWS 6
#define SHORT_ROW 512 /* bytes of a matrix's row, at most */
#define STEP 64  /* inputs; rows of x end with zeros up to a multiple of it */
#define BLOCK 64 /* positions that attention takes at once */
#define BLOCK_UNIT 32 /* a head's packed keys and values are as wide as a multiple of it */
#define UP_TO(n, multiple) (((n) + (multiple) - 1) / (multiple) * (multiple))

/* 2^f for |f| <= 1/2 is 1 + POWER_1 f + POWER_2 f^2 + ...: to 9e-8, and for what is rounded to bfloat16 to 3e-6. */
#define POWER_1 0.6931470036506653f
#define POWER_2 0.24022242426872253f
#define POWER_3 0.05550733581185341f
#define POWER_4 0.009671512991189957f
#define POWER_5 0.001326472731307149f
#define NARROW_POWER_1 0.6931241750717163f
#define NARROW_POWER_2 0.24024099111557007f
#define NARROW_POWER_3 0.055906426161527634f
#define NARROW_POWER_4 0.009582852944731712f

/* Of weights of which tokens are drawn; see draws.h. */
#define WEIGHT_BITS 42
#define ONE (INT64_C(1) << WEIGHT_BITS)
#define LOG2_E 1.4426950408889634
#define LN2_HIGH 0.6931471803691238 /* its last bits are 0, so that small multiples are exact */
#define LN2_LOW 1.9082149292705877e-10
#define ROUNDER 6755399441055744.0  /* 1.5 * 2^52: behind it doubles are whole numbers */
#define UNITS 4503599627370496.0    /* 2^52 */
#define UNITS_AS_BITS INT64_C(0x4330000000000000)

enum kind { FLOAT32, BFLOAT16, INT8, INT4, KINDS };

/* Some rows of x times some rows of a matrix. */
typedef struct {
    const uint8_t *weights;            /* where the first output's row begins */
    const uint16_t *scales;            /* its first scale; int4: bfloat16, one a group */
    int64_t row_bytes, row_scales;     /* from one output to the next; 0: the same output again and again */
    int64_t outputs;                   /* a multiple of the tile's */
    const uint8_t *x[MOST_ROWS];       /* packed as the tile's way wants it, aligned to 64 bytes */
    int64_t inputs;
    int64_t group;                     /* int4: inputs of a scale */
    const uint8_t *soon;               /* weights that are needed after these, as many are asked for meanwhile; or NULL */
    float *out;                        /* (rows, stride): sums */
    int64_t stride;
} tile;

typedef void multiply_tile(const tile *);
typedef void pack_inputs(const void *from, uint8_t *to, int64_t count);

/* How weights of one kind are multiplied with activations of one dtype at one level. */
typedef struct {
    multiply_tile *tiles[MOST_ROWS];   /* for 1 to most_rows rows */
    int most_rows;
    int x_bytes;                       /* of one packed activation */
    int pairs;                         /* within so many inputs even ones are packed before odd ones; 0: as they come */
    int block;                         /* rows of x end with zeros up to a multiple of it; 0: of STEP */
    int foreseen_rows;                 /* up to so many, tiles read long rows of weights as the processor foresees: none are
                                          asked for */
    pack_inputs *pack;                 /* bfloat16 inputs in a layout of the way's own; or NULL */
} way;

/* silu(gate) * up. is_narrow: round each step to bfloat16, as the published models do. */
typedef void activate(const float *gate, const float *up, float *out, int64_t count, int is_narrow);

/* See lanes.h. */
typedef void wave_row(
    const float *x, const float *bias, const float *frequency, const float *magnitude, float *out, int64_t count);

/* See rows.h. */
typedef float sum_squares(const float *x, int64_t count);
typedef void scale_row(float *x, const float *weight, float factor, int64_t count, int is_narrow);
typedef void to_probabilities(float *scores, int64_t count);
typedef void read_values(int is_narrow, const uint8_t *from, float *to, int64_t count);
typedef void store_values(int is_narrow, const float *values, uint8_t *out, int64_t count);
typedef void turn(const float *x, const float *cos, const float *sin, float *to, int64_t width);
typedef void add_to_row(const uint8_t *row, const float *sums, uint8_t *out, int64_t count, int is_narrow);
typedef void mix(
    int64_t num_rows, const uint8_t *const *rows, const float *weights, float *out, int64_t count, int is_narrow);
typedef void add_scaled(const uint8_t *row, float gate, float *sums, int64_t count, int is_narrow);
typedef int64_t find(const float *x, int64_t count);

/* See draws.h. */
typedef double largest_logit(int is_wide, const uint8_t *logits, int64_t count);
typedef int64_t weigh_row(
    int is_wide, const uint8_t *logits, int64_t count, double largest, double sharpness, int64_t *weights);

/* Some query rows and one block of what they attend to; see blocks.h. */
typedef struct {
    const uint8_t *q[MOST_ROWS];
    const uint8_t *keys, *values;      /* packed, those of blocks.h aligned to 64 bytes */
    int64_t width;
    float factor;                      /* of scores, on their way to powers of 2 */
    int64_t from[MOST_ROWS], to[MOST_ROWS]; /* the block's positions that each row sees */
    float *largest, *totals;           /* (rows): of what the rows have seen so far; changed */
    float *out;                        /* (rows, stride): weighed sums of values so far; changed */
    int64_t stride;
} block_tile;

typedef void place_head(const uint8_t *row, int64_t width, int64_t position, uint8_t *block);
typedef void pack_block(int is_narrow, const uint8_t *rows, int64_t width, int64_t from, int64_t to, uint8_t *packed);
typedef void attend_block(int rows, const block_tile *);

/* How a block of one key-value head lies in the cache, and how it is attended to. Either its rows lie one after another
   and are packed when they are needed, or each row is placed where `attend` looks for it. Of positions that a row does not
   see, it takes what it finds there with weight 0: any number, but not what is none. */
typedef struct {
    int most_rows;
    int item;                          /* bytes of an element of packed keys and values, and of queries */
    place_head *place_key, *place_value; /* where blocks are packed in the cache; or NULL */
    pack_block *pack_keys, *pack_values; /* where they are not; or NULL */
    attend_block *attend;
} block_way;

typedef struct {
    const way *narrow;                 /* by kind, activations in bfloat16; none for float32 weights */
    const way *wide;                   /* activations in float32 */
    activate *silu_times;
    wave_row *snake_row;
    sum_squares *square_sum;
    scale_row *scale;
    to_probabilities *softmax;
    read_values *read_row;
    store_values *store_row;
    turn *rotate;
    add_to_row *add_sums;
    mix *mix_rows;
    add_scaled *add_gated;
    find *find_largest;
    largest_logit *largest_logit;
    weigh_row *weigh;
    const block_way *blocks[2];        /* for a cache in float32, and in bfloat16 */
} level;

/* Asks the memory for so many bytes. Returns where they end. */
INLINE const uint8_t *ask_for(const uint8_t *from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
    return from + bytes;
}

extern const level portable_level;
#ifdef __x86_64__
extern const level avx2_level, avx512_level, avx512bf16_level;
extern const way avx512bf16_narrow[KINDS];
extern const block_way avx512bf16_blocks;
#endif

static inline int64_t row_bytes(int kind, int64_t inputs) {
    switch (kind) {
        case FLOAT32: return 4 * inputs;
        case BFLOAT16: return 2 * inputs;
        case INT8: return inputs;
        default: return (inputs + 1) / 2;
    }
}

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) {  /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/* The bfloat16 nearest to a value. */
static inline float rounded(float value) { return from_bfloat16(to_bfloat16(value)); }

#endif
