/* The activation of a codec's decoder, rows of which are converted on the way. */
#include "work.h"

#define ROWS_WAVED 64 /* by one piece of work */

typedef struct {
    work work;
    const level *level;
    bool is_narrow, is_out_narrow;
    int64_t num_rows, width;
    const uint8_t *x;
    const float *bias, *frequency, *magnitude;
    uint8_t *out;
} waves;

static void snake_piece(work *w, int phase, int64_t piece, void *memory) {
    (void)phase;
    const waves *s = (const waves *)w;
    const int64_t bytes = s->width * (s->is_narrow ? 2 : 4), out_bytes = s->width * (s->is_out_narrow ? 2 : 4);
    const int64_t end = MIN(s->num_rows, (piece + 1) * ROWS_WAVED);
    float *row = memory, *waved = row + s->width;
    for (int64_t r = piece * ROWS_WAVED; r < end; r++) {
        s->level->read_row(s->is_narrow, s->x + r * bytes, row, s->width);
        s->level->snake_row(row, s->bias, s->frequency, s->magnitude, waved, s->width);
        s->level->store_row(s->is_out_narrow, waved, s->out + r * out_bytes, s->width);
    }
}

/* Of rows with a bias added, (num_rows, width) in bfloat16 where is_narrow, else float32; out likewise. bias, frequency,
   magnitude: (width). run: NULL for one thread. */
int sage_snake(
    int level, int is_narrow, int is_out_narrow, const void *x, int64_t num_rows, int64_t width, const float *bias,
    const float *frequency, const float *magnitude, void *out, run_in_threads *run, unsigned threads
) {
    waves s = {
        .level = level_of(level), .is_narrow = is_narrow, .is_out_narrow = is_out_narrow, .num_rows = num_rows,
        .width = width, .x = x, .bias = bias, .frequency = frequency, .magnitude = magnitude, .out = out,
    };
    s.work.pieces[0] = (num_rows + ROWS_WAVED - 1) / ROWS_WAVED;
    s.work.run_piece = snake_piece;
    s.work.memory_bytes = 2 * (size_t)width * sizeof(float);
    return run_work(&s.work, s.work.pieces[0] > 1 ? run : NULL, threads);
}
