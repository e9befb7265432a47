/* A layer whose experts are computed by others: what comes before them, from rows to a call sorted by expert, and what
   comes after, from the call's rows to the layer's. Made of the pieces that layer.c computes with experts at hand, so a
   row has the same bits.

   Called by router/native_dispatch.py, which has checked pointers and shapes. */
#include "layer.h"
#include "memory.h"
#include "routing.h"
#include "shared_expert.h"

typedef struct {
    work work;
    const step *step;
    const layer *layer;
    const uint8_t *hidden;
    dispatched to;
    expert matrix; /* the gate's, as calls take it */
    int64_t gate_starts[2];
    call gate;
    shared_expert shared;
    int64_t *used, *starts, *token_of;
} dispatch_half;

static void sort_rows(const dispatch_half *h) {
    const step *s = h->step;
    const dispatched *to = &h->to;
    const int64_t slots = s->num_tokens * s->top_k;
    const int64_t num_used = sort_by_expert(
        to->chosen, s->num_tokens, s->top_k, s->num_experts, h->used, h->starts, to->row_of, h->token_of);
    uint32_t *counts = to->maps + num_used, *tokens = counts + num_used;
    for (int64_t i = 0; i < num_used; i++) {
        to->maps[i] = (uint32_t)h->used[i];
        counts[i] = (uint32_t)(h->starts[i + 1] - h->starts[i]);
    }
    for (int64_t r = 0; r < slots; r++) tokens[r] = (uint32_t)h->token_of[r];
    *to->num_used = num_used;
}

static void dispatch_piece(work *w, int phase, int64_t piece, void *memory) {
    const dispatch_half *h = (const dispatch_half *)w;
    const dispatched *to = &h->to;
    const shared_expert *shared = &h->shared;
    const int64_t gates = first_pieces(&h->gate);
    switch (phase) {
        case 0: {
            const call *packed[MOST_PACKED] = {&h->gate, shared->has_own_x ? &shared->rows : NULL};
            pack_normed(h->step, h->hidden, h->layer->post_norm, packed, to->normed, piece, memory);
            break;
        }
        case 1:
            if (piece < gates) product_piece(&h->gate, piece);
            else product_piece(&shared->gate, piece - gates);
            break;
        case 2: route_rows(h->step, &h->gate, to->chosen, to->weights, piece, memory); break;
        case 3: sort_rows(h); break;
        case 4: gate_piece(&shared->rows, piece); break;
        default: product_piece(&shared->rows, piece);
    }
}

static void cut_dispatch(dispatch_half *h, arena *a) {
    const step *s = h->step;
    const int64_t number = sizeof(int64_t);
    h->gate.x = cut(a, s->num_tokens * h->gate.x_stride);
    h->gate.out = cut(a, s->num_tokens * h->gate.out_stride);
    h->used = cut(a, s->num_experts * number);
    h->starts = cut(a, (s->num_experts + 1) * number);
    h->token_of = cut(a, s->num_tokens * s->top_k * number);
    cut_shared(&h->shared, s, &h->gate, a, h->to.shared_gates, h->to.shared_rows);
}

/* From hidden, (tokens, width) rows in the model's dtype, to a call for the experts of the checkpoint's own routing.
   to: with room for 2 * min(num_experts, tokens * top_k) + tokens * top_k numbers in its maps. threads: as many as will run
   it, most likely. Nothing is computed yet: see sage_run_half. NULL where there is no memory. */
void *sage_begin_dispatch(
    const step *s, const layer *l, const void *hidden, const dispatched *to, unsigned threads
) {
    dispatch_half plan = {.step = s, .layer = l, .hidden = hidden, .to = *to};
    plan.gate = one_product(s, &l->gate, threads, &plan.matrix, plan.gate_starts);
    plan_shared(&plan.shared, s, l, &plan.gate, threads);
    arena memory = {.used = UP_TO(sizeof plan, 64)};
    cut_dispatch(&plan, &memory);
    dispatch_half *h = take_memory(memory.used);
    if (!h) return NULL;
    *h = plan;
    memory = (arena){.at = (uint8_t *)h, .used = UP_TO(sizeof plan, 64)};
    cut_dispatch(h, &memory);
    h->gate.experts = &h->matrix, h->gate.starts = h->gate_starts;
    const size_t norming = norm_memory(s), routing = routing_memory(s);
    h->work = (work){
        .pieces = {packing_pieces(s), first_pieces(&h->gate) + shared_gate_pieces(&h->shared), packing_pieces(s), 1,
                   shared_first_pieces(&h->shared), shared_last_pieces(&h->shared)},
        .run_piece = dispatch_piece, .ended_ns = s->ended_ns, .memory_bytes = norming > routing ? norming : routing,
    };
    return h;
}

/* The same at once. */
int sage_dispatch(
    const step *s, const layer *l, const void *hidden, const dispatched *to, run_in_threads *run, unsigned threads
) {
    void *h = sage_begin_dispatch(s, l, hidden, to, run ? threads : 1);
    const int code = h ? sage_run_half(h, 0, run, threads) : OUT_OF_MEMORY;
    sage_end_half(h);
    return code;
}

typedef struct {
    work work;
    const step *step;
    const uint8_t *hidden;
    mixture mixed;
    uint8_t *out;
} combination;

static void combine_piece(work *w, int phase, int64_t piece, void *memory) {
    (void)phase;
    const combination *c = (const combination *)w;
    combine_rows(c->step, c->hidden, &c->mixed, c->out, piece, memory);
}

/* hidden + the sum of each token's rows, by rank: (tokens, width) rows in the model's dtype. rows: the call's, in its
   order; of: what sage_dispatch has left. As sage_begin_dispatch. */
void *sage_begin_combine(
    const step *s, const void *hidden, const void *rows, const dispatched *of, void *out
) {
    combination *c = take_memory(sizeof *c);
    if (c) *c = (combination){
        .work = {.pieces = {packing_pieces(s)}, .run_piece = combine_piece, .memory_bytes = mixing_memory(s)},
        .step = s, .hidden = hidden, .out = out,
        .mixed = {rows, of->row_of, of->weights, of->shared_gates, of->shared_rows},
    };
    return c;
}

/* The same at once. */
int sage_combine(
    const step *s, const void *hidden, const void *rows, const dispatched *of, void *out, run_in_threads *run,
    unsigned threads
) {
    void *c = sage_begin_combine(s, hidden, rows, of, out);
    const int code = c ? sage_run_half(c, 0, packing_pieces(s) > 1 ? run : NULL, threads) : OUT_OF_MEMORY;
    sage_end_half(c);
    return code;
}

/* All that lies between two calls for experts: with rows, those of the layer before are added to hidden, which gives
   `before`, the layer's input; without, hidden is. Then attention, which leaves its rows in `after`, and the call for the
   layer's experts. index and window: as of sage_begin_attention. `to` is read before it is written to. attention_ns:
   what attention took. Returns 0 or OUT_OF_MEMORY. */
int sage_reach_experts(
    const step *s, const layer *l, int64_t index, int64_t window, const void *hidden, const void *rows, void *before,
    void *after, const dispatched *to, int64_t *attention_ns, run_in_threads *run, unsigned threads
) {
    int code = rows ? sage_combine(s, hidden, rows, to, before, run, threads) : 0;
    const int64_t combined = now_ns();
    if (!code) code = sage_attention_half(s, l, index, window, rows ? before : hidden, after, run, threads);
    *attention_ns = now_ns() - combined;
    return code ? code : sage_dispatch(s, l, after, to, run, threads);
}

/* Whether none of so many values is infinite or not a number. */
int sage_are_finite(int is_narrow, const void *values, int64_t count) {
    int bad = 0;
    if (is_narrow)
        for (int64_t i = 0; i < count; i++) bad |= (((const uint16_t *)values)[i] & 0x7f80) == 0x7f80;
    else
        for (int64_t i = 0; i < count; i++) bad |= (((const uint32_t *)values)[i] & 0x7f800000) == 0x7f800000;
    return !bad;
}
