/* See shared_expert.h. */
#include "shared_expert.h"

bool packs_alike(const call *one, const call *other) {
    const way *a = one->first_way, *b = other->first_way;
    return a->x_bytes == b->x_bytes && a->pairs == b->pairs && a->pack == b->pack && one->x_stride == other->x_stride;
}

void plan_shared(shared_expert *p, const step *s, const layer *l, const call *of_layer, unsigned threads) {
    *p = (shared_expert){.is_there = l->shared.gate_up.weights != NULL};
    if (!p->is_there) return;
    p->gate = one_product(s, &l->shared_gate, threads, &p->of_gate, p->starts);
    p->of_rows = l->shared;
    p->rows = (call){
        .level = of_layer->level, .first = l->shared_gate_up, .second = l->shared_down, .num_experts = 1,
        .num_tokens = s->num_tokens, .is_narrow = s->is_narrow, .out_stride = s->width * (s->is_narrow ? 2 : 4),
        .threads = threads, .is_gated = true,
    };
    plan_call(&p->rows);
    p->has_own_x = !packs_alike(&p->rows, of_layer);
}

void cut_shared(shared_expert *p, const step *s, const call *of_layer, arena *a, uint8_t *gates, uint8_t *rows) {
    if (!p->is_there) return;
    p->gate.experts = &p->of_gate, p->rows.experts = &p->of_rows;
    p->gate.starts = p->rows.starts = p->starts;
    p->gate.x = of_layer->x;
    p->rows.x = p->has_own_x ? cut(a, s->num_tokens * p->rows.x_stride) : of_layer->x;
    p->rows.hidden = cut(a, s->num_tokens * p->rows.hidden_stride);
    p->gate.out = gates ? gates : cut(a, s->num_tokens * p->gate.out_stride);
    p->rows.out = rows ? rows : cut(a, s->num_tokens * p->rows.out_stride);
}

int64_t shared_gate_pieces(const shared_expert *p) { return p->is_there ? first_pieces(&p->gate) : 0; }

int64_t shared_first_pieces(const shared_expert *p) { return p->is_there ? first_pieces(&p->rows) : 0; }

int64_t shared_last_pieces(const shared_expert *p) { return p->is_there ? last_pieces(&p->rows) : 0; }

/* sums + rows / (1 + e^-gates), row by row, in place. rows: (num_rows, width) and gates: (num_rows, 1), stride bytes apart, in
   the model's dtype; sums: (num_rows, width) float32. */
int sage_add_gated(
    int level, int is_narrow, const void *rows, const void *gates, int64_t stride, int64_t num_rows, int64_t width,
    float *sums
) {
    const int64_t item = is_narrow ? 2 : 4;
    for (int64_t r = 0; r < num_rows; r++) {
        float gate;
        level_of(level)->read_row(is_narrow, (const uint8_t *)gates + r * stride, &gate, 1);
        level_of(level)->add_gated((const uint8_t *)rows + r * width * item, gate, sums + r * width, width, is_narrow);
    }
    return 0;
}
