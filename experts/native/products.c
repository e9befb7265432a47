/* Matrix products in which a row's bits depend on nothing but the row: not on how many rows come with it, where it lies
   among them, how many threads compute, or which thread computes what. Every (row, output) pair is summed by the same
   instructions in the same order (lanes.h, level_*.c); everything here only decides who computes it when.

   Called through ctypes by experts/native_products.py, which has checked every pointer, shape and index. Nothing but
   memory is kept between calls (memory.c). */
#include "calls.h"
#include "memory.h"

#include <stdlib.h>

#define PANEL_BYTES (256 << 10) /* of weights: they stay in the second cache while rows pass by */
#define MOST_OUTPUTS 512        /* of a panel */
#define GATED_OUTPUTS 128       /* of a panel of gates, and of one of ups; a multiple of every way's `pairs` and `block` */
#define GATED_PART 64           /* of these, for more than a tile of rows */
#define ROWS_GATED 48           /* whose sums are kept until they are activated */
#define GATED_STRIDE (GATED_OUTPUTS + OUTPUTS) /* of rows of sums, with room behind the last */
#define SUMS_STRIDE (MOST_OUTPUTS + OUTPUTS)
#define AHEAD_BYTES (16 << 10)
#define ROWS_OF_A_RUN 96        /* of one small matrix, where many rows come: a multiple of every way's rows */
#define FEW_PANELS 16

static const uint8_t *weights_of(const form *form, const matrix *m, int64_t output) {
    return m->weights + output * row_bytes((int)form->kind, form->inputs);
}

/* Some rows, as many as a tile has at most, and what they are multiplied with; sums: (rows, stride), of which OUTPUTS - 1
   behind the last output may be overwritten. */
typedef struct {
    const way *way;
    const form *form;
    const matrix *matrix;
    const uint8_t *x[MOST_ROWS];
    int rows;
    int64_t from, to; /* outputs */
    float *sums;
    int64_t stride;
} rows_of_tile;

/* Outputs [first, first + count): a multiple of OUTPUTS, or one. soon: see tile. */
static void multiply_run(const rows_of_tile *m, int64_t first, int64_t count, const uint8_t *soon) {
    const form *form = m->form;
    const int64_t bytes = row_bytes((int)form->kind, form->inputs);
    const int64_t groups = form->kind == INT4 ? (form->inputs + form->group - 1) / form->group : 0;
    tile t = {
        .weights = m->matrix->weights + first * bytes, .scales = m->matrix->scales + first * groups, .row_bytes = bytes,
        .row_scales = groups, .outputs = count, .inputs = form->inputs, .group = form->group, .soon = soon,
        .out = m->sums + first - m->from, .stride = m->stride,
    };
    for (int r = 0; r < m->rows; r++) t.x[r] = m->x[r];
    if (count < OUTPUTS) t.row_bytes = t.row_scales = 0, t.outputs = OUTPUTS, t.soon = NULL; /* as often as there is room */
    m->way->tiles[m->rows - 1](&t);
}

static void scale_int8(const rows_of_tile *m) {
    for (int r = 0; r < m->rows; r++)
        for (int64_t o = m->from; o < m->to; o++)
            m->sums[r * m->stride + o - m->from] *= from_bfloat16(m->matrix->scales[o]);
}

/* All outputs, with weights that come from memory: they are asked for some outputs ahead, and at the end `then`, what is
   needed after these; NULL where nobody knows. */
static void multiply_rows(const rows_of_tile *m, const uint8_t *then) {
    const int64_t bytes = row_bytes((int)m->form->kind, m->form->inputs);
    const bool is_foreseen = m->rows <= m->way->foreseen_rows && bytes > SHORT_ROW;
    const int64_t ahead = UP_TO(AHEAD_BYTES / bytes + 1, OUTPUTS); /* outputs, as many as are asked for ahead */
    for (int64_t first = m->from, count; first < m->to; first += count) {
        const int64_t left = m->to - first;
        const bool is_end = left <= ahead + OUTPUTS;
        count = left < OUTPUTS ? 1 : (is_end ? left : left - ahead) / OUTPUTS * OUTPUTS;
        multiply_run(
            m, first, count, is_end ? then : is_foreseen ? NULL : weights_of(m->form, m->matrix, first + ahead));
    }
    if (m->form->kind == INT8) scale_int8(m);
}

/* All outputs, once more for other rows: the weights are in a cache. Meanwhile a share of what is needed after all of these
   rows is asked for, of as many bytes as these weights have: in passes 1 to passes - 1 all of it. */
static void multiply_again(const rows_of_tile *m, int64_t pass, int64_t passes, const uint8_t *then) {
    const int64_t fours = (m->to - m->from) / OUTPUTS;
    const int64_t begin = m->from + fours * (pass - 1) / (passes - 1) * OUTPUTS;
    const int64_t end = m->from + fours * pass / (passes - 1) * OUTPUTS;
    for (int64_t first = m->from, count; first < m->to; first += count) {
        const int64_t stop = first < begin ? begin : first < end ? end : m->from + fours * OUTPUTS;
        const bool is_share = then && first >= begin && first < end;
        count = first < stop ? stop - first : 1;
        multiply_run(m, first, count, is_share ? then + (weights_of(m->form, m->matrix, first) -
                                                         weights_of(m->form, m->matrix, m->from)) : NULL);
    }
    if (m->form->kind == INT8) scale_int8(m);
}

/* For one tile of rows after another, of `passes`. */
static void multiply_pass(const rows_of_tile *m, int64_t pass, int64_t passes, const uint8_t *then) {
    if (pass) multiply_again(m, pass, passes, then);
    else multiply_rows(m, passes > 1 ? NULL : then);
}

static int64_t passes_for(int64_t rows, int most) { return (rows + most - 1) / most; }

/* The weights of the piece that the thread with this one probably takes next: threads take turns. NULL: of no piece of
   this call. Pieces of the last product follow those of the first. */
static const uint8_t *next_weights(const call *c, int64_t piece) {
    piece += c->threads;
    const int64_t gated = c->is_gated ? first_pieces(c) : 0;
    const bool is_last = piece >= gated;
    const int64_t inside = (is_last ? piece - gated : piece) / c->row_runs;
    const int64_t count = c->per_expert[is_last && c->is_gated ? 2 : 1], e = inside / count;
    if (e >= c->num_experts || c->starts[e + 1] == c->starts[e]) return NULL;
    if (!is_last) return weights_of(&c->first, &c->experts[e].gate_up, inside % count * GATED_OUTPUTS);
    return c->is_gated ? weights_of(&c->second, &c->experts[e].down, inside % count * c->panel)
                       : weights_of(&c->first, &c->experts[e].gate_up, inside % count * c->panel);
}

static const uint8_t *row_of_x(const call *c, int64_t row) {
    return c->x + (c->token_of ? c->token_of[row] : row) * c->x_stride;
}

void pack_tokens(const call *c, int64_t piece) {
    const int64_t end = MIN(c->num_tokens, (piece + 1) * ROWS_PACKED);
    for (int64_t t = piece * ROWS_PACKED; t < end; t++)
        pack_row(
            c->first_way, c->is_narrow, c->tokens + t * c->token_stride, c->x + t * c->x_stride, c->first.inputs);
}

/* Sums of rows [row, row + rows) with outputs [from, to) of the first product: (rows, GATED_STRIDE). More than a tile of
   rows take the outputs in parts, so that weights come from the second cache but for the first tile. then: the weights
   that are needed after these; NULL where nobody knows. */
static void multiply_panel(
    const call *c, const matrix *matrix, int64_t from, int64_t to, int64_t row, int64_t rows, const uint8_t *then,
    float *sums
) {
    const int most = c->first_way->most_rows;
    const int64_t part = rows > most ? GATED_PART : to - from, passes = passes_for(rows, most);
    for (int64_t begin = from; begin < to; begin += part) {
        const int64_t end = MIN(to, begin + part);
        const uint8_t *next = end < to ? weights_of(&c->first, matrix, end) : then;
        for (int64_t first = 0, pass = 0; first < rows; pass++) {
            rows_of_tile m = {
                .way = c->first_way, .form = &c->first, .matrix = matrix, .rows = next_rows(rows - first, most),
                .from = begin, .to = end, .sums = sums + first * GATED_STRIDE + begin - from, .stride = GATED_STRIDE,
            };
            for (int r = 0; r < m.rows; r++) m.x[r] = row_of_x(c, row + first + r);
            multiply_pass(&m, pass, passes, next);
            first += m.rows;
        }
    }
}

/* A panel of gates and the one of the same ups, and the activation: a part of each row's hidden values. */
void gate_piece(const call *c, int64_t piece) {
    const int64_t e = piece / c->per_expert[1], width = c->first.outputs / 2;
    const int64_t from = piece % c->per_expert[1] * GATED_OUTPUTS, to = MIN(width, from + GATED_OUTPUTS);
    const matrix *m = &c->experts[e].gate_up;
    float gates[ROWS_GATED * GATED_STRIDE], ups[ROWS_GATED * GATED_STRIDE], values[GATED_OUTPUTS];
    uint16_t words[GATED_OUTPUTS];
    const int64_t end = c->starts[e + 1];
    const uint8_t *ups_begin = weights_of(&c->first, m, width + from), *next = next_weights(c, piece);
    for (int64_t row = c->starts[e]; row < end;) {
        const int rows = next_rows(end - row, ROWS_GATED);
        multiply_panel(c, m, from, to, row, rows, ups_begin, gates);
        multiply_panel(c, m, width + from, width + to, row, rows, next, ups);
        for (int r = 0; r < rows; r++) {
            c->level->silu_times(gates + r * GATED_STRIDE, ups + r * GATED_STRIDE, values, to - from, c->is_narrow);
            uint8_t *hidden = c->hidden + (row + r) * c->hidden_stride + from * c->second_way->x_bytes;
            c->level->store_row(true, values, (uint8_t *)words, to - from);
            pack_row(
                c->second_way, c->is_narrow, c->is_narrow ? (void *)words : (void *)values, hidden, to - from);
        }
        row += rows;
    }
}

static void add_bias(const call *c, int64_t from, int64_t count, float *sums) {
    uint8_t biased[MOST_OUTPUTS * sizeof(float)];
    c->level->add_sums(c->bias + from * (c->is_narrow ? 2 : 4), sums, biased, count, c->is_narrow);
    c->level->read_row(c->is_narrow, biased, sums, count);
}

/* A panel of the last product, for all rows of one expert, or for a run of one matrix's rows. */
void product_piece(const call *c, int64_t piece) {
    const int phase = c->is_gated ? 2 : 1;
    const form *form = c->is_gated ? &c->second : &c->first;
    const way *way = c->is_gated ? c->second_way : c->first_way;
    const int64_t run = piece % c->row_runs, e = piece / c->row_runs / c->per_expert[phase];
    const int64_t from = piece / c->row_runs % c->per_expert[phase] * c->panel, to = MIN(form->outputs, from + c->panel);
    const matrix *m = c->is_gated ? &c->experts[e].down : &c->experts[e].gate_up;
    const int item = c->is_narrow && !c->is_widened ? 2 : 4;
    float sums[MOST_ROWS * SUMS_STRIDE];
    const int64_t rows_of_run = c->row_runs > 1 ? ROWS_OF_A_RUN : c->starts[e + 1] - c->starts[e];
    const int64_t begin = c->starts[e] + run * rows_of_run, end = MIN(c->starts[e + 1], begin + rows_of_run);
    const uint8_t *next = next_weights(c, piece + (c->is_gated ? first_pieces(c) : 0));
    const int64_t passes = passes_for(end - begin, way->most_rows);
    for (int64_t row = begin, pass = 0; row < end; pass++) {
        const int rows = next_rows(end - row, way->most_rows);
        rows_of_tile tile = {
            .way = way, .form = form, .matrix = m, .rows = rows, .from = from, .to = to, .sums = sums,
            .stride = SUMS_STRIDE,
        };
        for (int r = 0; r < rows; r++)
            tile.x[r] = c->is_gated ? c->hidden + (row + r) * c->hidden_stride : row_of_x(c, row + r);
        multiply_pass(&tile, pass, passes, next);
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * c->out_stride + from * item;
            float *row_sums = sums + r * SUMS_STRIDE;
            if (c->bias) add_bias(c, from, to - from, row_sums);
            if (c->is_widened && c->is_narrow)
                for (int64_t i = 0; i < to - from; i++) row_sums[i] = rounded(row_sums[i]);
            if (c->added) c->level->add_sums(c->added + at, row_sums, c->out + at, to - from, c->is_narrow);
            else c->level->store_row(c->is_narrow && !c->is_widened, row_sums, c->out + at, to - from);
        }
        row += rows;
    }
}

void plan_call(call *c) {
    const way *ways = c->is_narrow ? c->level->narrow : c->level->wide;
    const form *last = c->is_gated ? &c->second : &c->first;
    c->first_way = &ways[c->first.kind];
    c->x_stride = packed_stride(c->first_way, c->first.inputs);
    if (c->is_gated) {
        c->second_way = &ways[c->second.kind];
        c->hidden_stride = packed_stride(c->second_way, c->second.inputs);
        c->per_expert[1] = (c->first.outputs / 2 + GATED_OUTPUTS - 1) / GATED_OUTPUTS;
    }
    c->panel = MIN(MOST_OUTPUTS, UP_TO(PANEL_BYTES / row_bytes((int)last->kind, last->inputs) + 1, OUTPUTS));
    c->per_expert[c->is_gated ? 2 : 1] = (last->outputs + c->panel - 1) / c->panel;
    const bool is_cut = !c->is_gated && c->num_experts == 1 && c->per_expert[1] < FEW_PANELS;
    c->row_runs = is_cut ? (c->num_tokens + ROWS_OF_A_RUN - 1) / ROWS_OF_A_RUN : 1;
    if (c->row_runs < 1) c->row_runs = 1;
}

int64_t first_pieces(const call *c) { return c->per_expert[1] * c->num_experts * (c->is_gated ? 1 : c->row_runs); }

int64_t last_pieces(const call *c) { return c->per_expert[2] * c->num_experts; }

typedef struct {
    work work;
    call call;
} product;

static void run_piece(work *w, int phase, int64_t piece, void *memory) {
    (void)memory;
    const call *c = &((const product *)w)->call;
    if (phase == 0) pack_tokens(c, piece);
    else if (phase == 1 && c->is_gated) gate_piece(c, piece);
    else product_piece(c, piece);
}

/* Products of rows with each expert's matrices, or with one matrix.
   forms: kind, group, outputs, inputs of the first matrix, and of the second where is_gated. counts: rows of each of
   num_experts, one after the other. token_of: num_rows numbers of tokens, or NULL. Strides in bytes. out: (num_rows,
   outputs of the last matrix) in the tokens' dtype. run: NULL for one thread. */
int sage_multiply(
    int level, int is_narrow, int is_gated, const int64_t *forms, const expert *experts, int64_t num_experts,
    const int64_t *counts, const int64_t *token_of, const void *tokens, int64_t num_tokens, int64_t token_stride,
    void *out, int64_t out_stride, run_in_threads *run, unsigned threads
) {
    product p = {.call = {
        .level = level_of(level),
        .first = {forms[0], forms[1], forms[2], forms[3]},
        .experts = experts,
        .num_experts = num_experts,
        .token_of = token_of,
        .tokens = tokens,
        .num_tokens = num_tokens,
        .token_stride = token_stride,
        .is_narrow = is_narrow,
        .out = out,
        .out_stride = out_stride,
        .threads = run ? threads : 1,
        .is_gated = is_gated,
    }};
    call *c = &p.call;
    if (is_gated) c->second = (form){forms[4], forms[5], forms[6], forms[7]};
    plan_call(c);
    int64_t *starts = malloc((size_t)(num_experts + 1) * sizeof *starts);
    if (!starts) return OUT_OF_MEMORY;
    starts[0] = 0;
    for (int64_t e = 0; e < num_experts; e++) starts[e + 1] = starts[e] + counts[e];
    c->starts = starts;
    const int64_t num_rows = starts[num_experts];
    c->x = take_memory((size_t)(num_tokens * c->x_stride + num_rows * c->hidden_stride + 64));
    if (!c->x) {
        free(starts);
        return OUT_OF_MEMORY;
    }
    c->hidden = c->x + num_tokens * c->x_stride;
    p.work.pieces[0] = (num_tokens + ROWS_PACKED - 1) / ROWS_PACKED;
    p.work.pieces[1] = first_pieces(c);
    p.work.pieces[2] = last_pieces(c);
    p.work.run_piece = run_piece;
    const int code = run_work(&p.work, run, threads);
    give_memory(c->x);
    free(starts);
    return code;
}
