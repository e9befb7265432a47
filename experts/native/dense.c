/* The second half of a layer without experts: norm before, the gated projections that every row passes, residual after.

   Called by router/native_step.py, and for layers one after another by layers.c. */
#include "layer.h"
#include "memory.h"

typedef struct {
    work work;
    const step *step;
    const layer *layer;
    const uint8_t *hidden;
    int64_t starts[2];
    call rows;
} dense_half;

static void dense_half_piece(work *w, int phase, int64_t piece, void *memory) {
    const dense_half *h = (const dense_half *)w;
    switch (phase) {
        case 0:
            pack_normed(
                h->step, h->hidden, h->layer->post_norm, (const call *[MOST_PACKED]){&h->rows}, NULL, piece, memory);
            break;
        case 4: gate_piece(&h->rows, piece); break;
        default: product_piece(&h->rows, piece);
    }
}

static void cut_dense(dense_half *h, arena *a) {
    h->rows.x = cut(a, h->step->num_tokens * h->rows.x_stride);
    h->rows.hidden = cut(a, h->step->num_tokens * h->rows.hidden_stride);
}

/* hidden + projections(norm(hidden)): (tokens, width) rows in the model's dtype. threads: as many as will run it, most
   likely. Nothing is computed yet: see sage_run_half. NULL where there is no memory. */
void *sage_begin_dense(const step *s, const layer *l, const void *hidden, void *out, unsigned threads) {
    dense_half plan = {
        .step = s, .layer = l, .hidden = hidden, .starts = {0, s->num_tokens},
        .rows = {
            .level = level_of((int)s->level), .first = l->shared_gate_up, .second = l->shared_down,
            .experts = &l->shared, .num_experts = 1, .num_tokens = s->num_tokens, .is_narrow = s->is_narrow,
            .out = out, .out_stride = s->width * (s->is_narrow ? 2 : 4), .added = hidden, .threads = threads,
            .is_gated = true,
        },
    };
    plan_call(&plan.rows);
    arena memory = {.used = UP_TO(sizeof plan, 64)};
    cut_dense(&plan, &memory);
    dense_half *h = take_memory(memory.used);
    if (!h) return NULL;
    *h = plan;
    memory = (arena){.at = (uint8_t *)h, .used = UP_TO(sizeof plan, 64)};
    cut_dense(h, &memory);
    h->rows.starts = h->starts;
    h->work = (work){
        /* Phases have the numbers of the same work in a layer with experts. */
        .pieces = {packing_pieces(s), 0, 0, 0, first_pieces(&h->rows), last_pieces(&h->rows)},
        .run_piece = dense_half_piece, .memory_bytes = norm_memory(s), .ended_ns = s->ended_ns,
    };
    return h;
}

/* The same at once. */
int sage_dense_half(
    const step *s, const layer *l, const void *hidden, void *out, run_in_threads *run, unsigned threads
) {
    void *h = sage_begin_dense(s, l, hidden, out, run ? threads : 1);
    const int code = h ? sage_run_half(h, 0, run, threads) : OUT_OF_MEMORY;
    sage_end_half(h);
    if (s->ended_ns) /* what is not done takes no time */
        for (int phase = 1; phase < PHASES; phase++)
            if (phase < 4 || phase > 5) s->ended_ns[phase] = s->ended_ns[phase - 1];
    return code;
}
