/* A decoder layer in two calls: attention, and the mixture of experts, each with its norm before and its residual after;
   and the head with its norm. They are made of the pieces that the calls for one operation are made of, in the same
   dtypes between them, so a row has the bits that these calls give it one after another. Threads meet once a half in
   place of once an operation.

   Called by router/native_step.py and router/native_head.py, which have checked pointers, shapes, block numbers and
   limits. */
#include "layer.h"
#include "attention.h"
#include "memory.h"
#include "routing.h"
#include "shared_expert.h"

void *cut(arena *a, int64_t bytes) {
    void *part = a->at ? a->at + a->used : NULL;
    a->used += UP_TO((size_t)bytes, 64);
    return part;
}

int64_t packing_pieces(const step *s) { return (s->num_tokens + ROWS_PACKED - 1) / ROWS_PACKED; }

size_t norm_memory(const step *s) { return 3 * (size_t)s->width * sizeof(float); }

size_t routing_memory(const step *s) { return (size_t)UP_TO(s->num_experts, UNIT) * sizeof(float); }

size_t mixing_memory(const step *s) {
    return (size_t)UP_TO(s->width, UNIT) * sizeof(float) + (size_t)s->top_k * sizeof(uint8_t *);
}

void pack_normed(
    const step *s, const uint8_t *hidden, const uint8_t *norm, const call *const calls[MOST_PACKED], uint8_t *kept,
    int64_t piece, float *memory
) {
    const level *level = calls[0]->level;
    const int64_t item = s->is_narrow ? 2 : 4, end = MIN(s->num_tokens, (piece + 1) * ROWS_PACKED);
    for (int64_t t = piece * ROWS_PACKED; t < end; t++) {
        uint8_t *normed = kept ? kept + t * s->width * item : (uint8_t *)(memory + 2 * s->width);
        level->read_row(s->is_narrow, hidden + t * s->width * item, memory, s->width);
        norm_row(level, s->is_narrow, memory, norm, memory + s->width, s->eps, s->width);
        level->store_row(s->is_narrow, memory, normed, s->width);
        for (int i = 0; i < MOST_PACKED; i++) {
            const call *c = calls[i];
            if (c) pack_row(c->first_way, s->is_narrow, normed, c->x + t * c->x_stride, s->width);
        }
    }
}

call one_product(const step *s, const linear *l, unsigned threads, expert *one, int64_t *starts) {
    *one = (expert){.gate_up = l->matrix};
    starts[0] = 0, starts[1] = s->num_tokens;
    call c = {
        .level = level_of((int)s->level), .first = l->form, .experts = one, .num_experts = 1, .starts = starts,
        .num_tokens = s->num_tokens, .is_narrow = s->is_narrow, .out_stride = l->form.outputs * (s->is_narrow ? 2 : 4),
        .threads = threads,
    };
    plan_call(&c);
    return c;
}

typedef struct {
    work work;
    const step *step;
    const layer *layer;
    const uint8_t *hidden;
    expert matrices[2]; /* of both products, as calls take them */
    int64_t starts[2];
    call qkv, output;
    attention attention;
} attention_half;

static void attention_half_piece(work *w, int phase, int64_t piece, void *memory) {
    const attention_half *h = (const attention_half *)w;
    switch (phase) {
        case 0:
            pack_normed(
                h->step, h->hidden, h->layer->input_norm, (const call *[MOST_PACKED]){&h->qkv}, NULL, piece, memory);
            break;
        case 1: product_piece(&h->qkv, piece); break;
        case 2: place_tokens(&h->attention, piece, memory); break;
        case 3: attend_piece(&h->attention, piece, memory); break;
        case 4: pack_tokens(&h->output, piece); break;
        default: product_piece(&h->output, piece);
    }
}

static void cut_attention(attention_half *h, arena *a, int64_t **span_pieces) {
    const int64_t tokens = h->step->num_tokens, item = h->step->is_narrow ? 2 : 4;
    h->qkv.x = cut(a, tokens * h->qkv.x_stride);
    h->qkv.out = cut(a, tokens * h->qkv.out_stride);
    h->attention.q = cut(a, tokens * h->attention.heads * h->attention.q_stride);
    h->attention.out = cut(a, tokens * h->output.first.inputs * item);
    h->output.x = cut(a, tokens * h->output.x_stride);
    *span_pieces = cut(a, (h->step->num_spans + 1) * (int64_t)sizeof **span_pieces);
}

/* hidden + output(attention(norm(hidden))): (tokens, width) rows in the model's dtype. index: of the layer in the cache.
   window: 0 for none. threads: as many as will run it, most likely. Nothing is computed yet: see sage_run_half. NULL
   where there is no memory. */
void *sage_begin_attention(
    const step *s, const layer *l, int64_t index, int64_t window, const void *hidden, void *out, unsigned threads
) {
    int64_t *span_pieces;
    const int64_t item = s->is_narrow ? 2 : 4, at = index * s->layer_bytes;
    attention_half plan = {
        .step = s, .layer = l, .hidden = hidden,
        .attention = {
            .level = level_of((int)s->level), .is_narrow = s->is_narrow, .num_tokens = s->num_tokens,
            .heads = s->heads, .kv_heads = s->kv_heads, .width = s->head_width, .window = window,
            .has_wide_norms = s->has_wide_norms, .bound = s->bound,
            .num_spans = s->num_spans, .block_bytes = s->block_bytes, .most_blocks = s->most_blocks, .eps = s->eps,
            .scale = s->scale, .q_norm = l->q_norm, .k_norm = l->k_norm, .cos = s->cos, .sin = s->sin,
            .keys = s->keys + at, .values = s->values + at, .blocks = s->blocks, .offsets = s->offsets,
            .spans = s->spans, .tables = s->tables,
        },
    };
    plan.qkv = one_product(s, &l->qkv, threads, &plan.matrices[0], plan.starts);
    plan.output = one_product(s, &l->output, threads, &plan.matrices[1], plan.starts);
    plan.attention.way = plan.attention.level->blocks[s->is_narrow];
    plan.attention.q_stride = s->head_width * plan.attention.way->item;
    arena memory = {.used = UP_TO(sizeof plan, 64)};
    cut_attention(&plan, &memory, &span_pieces);
    attention_half *h = take_memory(memory.used);
    if (!h) return NULL;
    *h = plan;
    memory = (arena){.at = (uint8_t *)h, .used = UP_TO(sizeof plan, 64)};
    cut_attention(h, &memory, &span_pieces);
    h->qkv.experts = &h->matrices[0], h->output.experts = &h->matrices[1];
    h->qkv.starts = h->output.starts = h->starts;
    h->qkv.bias = l->qkv_bias, h->output.bias = l->output_bias;
    attention *a = &h->attention;
    plan_attention(a, span_pieces);
    a->qkv = h->qkv.out;
    h->output.tokens = a->out, h->output.token_stride = h->output.first.inputs * item;
    h->output.out = out, h->output.added = hidden;
    h->work = (work){
        .pieces = {packing_pieces(s), first_pieces(&h->qkv), placing_pieces(a), span_pieces[s->num_spans],
                   packing_pieces(s), first_pieces(&h->output)},
        .run_piece = attention_half_piece, .ended_ns = s->ended_ns,
    };
    const size_t attending = attention_memory(a), norming = norm_memory(s);
    h->work.memory_bytes = attending > norming ? attending : norming;
    return h;
}

/* What is left of a half, or of it what threads take before the clock says until_ns (0: all of it): at least one piece.
   Returns 0, PAUSED or OUT_OF_MEMORY. Only then are its results there. */
int sage_run_half(void *half, int64_t until_ns, run_in_threads *run, unsigned threads) {
    work *w = half;
    w->until_ns = until_ns;
    return run_work(w, run, threads);
}

/* A half that is done, or will not be. */
void sage_end_half(void *half) { give_memory(half); }

/* The same at once. */
int sage_attention_half(
    const step *s, const layer *l, int64_t index, int64_t window, const void *hidden, void *out, run_in_threads *run,
    unsigned threads
) {
    void *h = sage_begin_attention(s, l, index, window, hidden, out, run ? threads : 1);
    const int code = h ? sage_run_half(h, 0, run, threads) : OUT_OF_MEMORY;
    sage_end_half(h);
    return code;
}

typedef struct {
    work work;
    const step *step;
    const layer *layer;
    const uint8_t *hidden;
    uint8_t *out;
    expert matrix; /* the gate's, as calls take it */
    int64_t gate_starts[2];
    call gate, experts;
    shared_expert shared;
    bool has_own_x; /* whether experts take rows packed in another way than the gate */
    int64_t *chosen, *used, *num_used, *starts, *row_of, *token_of;
    float *weights;
    expert *called; /* the experts in use */
} experts_half;

void route_rows(
    const step *s, const call *gate, int64_t *chosen, float *weights, int64_t piece, float *memory
) {
    const int64_t end = MIN(s->num_tokens, (piece + 1) * ROWS_PACKED);
    for (int64_t t = piece * ROWS_PACKED; t < end; t++)
        route_row(
            gate->level, s->is_narrow, gate->out + t * gate->out_stride, s->num_experts, s->top_k, s->is_normalised,
            chosen + t * s->top_k, weights + t * s->top_k, memory);
}

static void call_experts(experts_half *h) {
    const step *s = h->step;
    *h->num_used = sort_by_expert(
        h->chosen, s->num_tokens, s->top_k, s->num_experts, h->used, h->starts, h->row_of, h->token_of);
    for (int64_t i = 0; i < *h->num_used; i++) h->called[i] = h->layer->experts[h->used[i]];
}

void combine_rows(
    const step *s, const uint8_t *hidden, const mixture *m, uint8_t *out, int64_t piece, float *memory
) {
    const level *level = level_of((int)s->level);
    const int64_t stride = s->width * (s->is_narrow ? 2 : 4), end = MIN(s->num_tokens, (piece + 1) * ROWS_PACKED);
    const uint8_t **mixed = (const uint8_t **)(memory + UP_TO(s->width, UNIT));
    for (int64_t t = piece * ROWS_PACKED; t < end; t++) {
        for (int64_t k = 0; k < s->top_k; k++) mixed[k] = m->rows + m->row_of[t * s->top_k + k] * stride;
        level->mix_rows(s->top_k, mixed, m->weights + t * s->top_k, memory, s->width, s->is_narrow);
        if (m->shared_gates) {
            float gate;
            level->read_row(s->is_narrow, m->shared_gates + t * (s->is_narrow ? 2 : 4), &gate, 1);
            level->add_gated(m->shared_rows + t * stride, gate, memory, s->width, s->is_narrow);
        }
        level->add_sums(hidden + t * stride, memory, out + t * stride, s->width, s->is_narrow);
    }
}

/* One of the call's pieces, of which there are `own`, or of those that the expert has that every row passes. */
static void product_or_shared(const call *c, int64_t own, const call *shared, int64_t piece) {
    if (piece < own) product_piece(c, piece);
    else product_piece(shared, piece - own);
}

static void experts_half_piece(work *w, int phase, int64_t piece, void *memory) {
    experts_half *h = (experts_half *)w;
    const shared_expert *shared = &h->shared;
    const call *packed[MOST_PACKED] = {
        &h->gate, h->has_own_x ? &h->experts : NULL, shared->has_own_x ? &shared->rows : NULL,
    };
    const mixture mixed = {
        h->experts.out, h->row_of, h->weights, shared->is_there ? shared->gate.out : NULL, shared->rows.out,
    };
    switch (phase) {
        case 0: pack_normed(h->step, h->hidden, h->layer->post_norm, packed, NULL, piece, memory); break;
        case 1: product_or_shared(&h->gate, first_pieces(&h->gate), &shared->gate, piece); break;
        case 2: route_rows(h->step, &h->gate, h->chosen, h->weights, piece, memory); break;
        case 3: call_experts(h); break;
        case 4: {
            const int64_t own = first_pieces(&h->experts);
            if (piece < own) gate_piece(&h->experts, piece);
            else gate_piece(&shared->rows, piece - own);
            break;
        }
        case 5: product_or_shared(&h->experts, last_pieces(&h->experts), &shared->rows, piece); break;
        default: combine_rows(h->step, h->hidden, &mixed, h->out, piece, memory);
    }
}

static void cut_experts(experts_half *h, arena *a) {
    const step *s = h->step;
    const int64_t slots = s->num_tokens * s->top_k, number = sizeof(int64_t);
    h->gate.x = cut(a, s->num_tokens * h->gate.x_stride);
    h->experts.x = h->has_own_x ? cut(a, s->num_tokens * h->experts.x_stride) : h->gate.x;
    h->gate.out = cut(a, s->num_tokens * h->gate.out_stride);
    h->starts = cut(a, (s->num_experts + 1) * number);
    h->row_of = cut(a, slots * number);
    h->token_of = cut(a, slots * number);
    h->called = cut(a, h->experts.num_experts * (int64_t)sizeof(expert));
    h->experts.hidden = cut(a, slots * h->experts.hidden_stride);
    h->experts.out = cut(a, slots * h->experts.out_stride);
    cut_shared(&h->shared, s, &h->gate, a, NULL, NULL);
}

/* hidden + experts(norm(hidden)) by the checkpoint's own routing: (tokens, width) rows in the model's dtype.
   chosen: (tokens, top_k), best first, and with which weights. used: the experts in use, ascending, num_used of them; room for num_experts.
   threads: as many as will run it, most likely. Nothing is computed yet: see sage_run_half. NULL where there is no
   memory. */
void *sage_begin_experts(
    const step *s, const layer *l, const void *hidden, void *out, int64_t *chosen, float *weights, int64_t *used,
    int64_t *num_used, unsigned threads
) {
    const int64_t slots = s->num_tokens * s->top_k;
    experts_half plan = {
        .step = s, .layer = l, .hidden = hidden, .out = out,
        .experts = {
            .level = level_of((int)s->level), .first = l->gate_up, .second = l->down,
            .num_experts = MIN(s->num_experts, slots), .num_tokens = s->num_tokens, .is_narrow = s->is_narrow,
            .out_stride = s->width * (s->is_narrow ? 2 : 4),
            .threads = threads, .is_gated = true,
        },
        .chosen = chosen, .weights = weights, .used = used, .num_used = num_used,
    };
    plan.gate = one_product(s, &l->gate, threads, &plan.matrix, plan.gate_starts);
    plan_call(&plan.experts);
    plan.has_own_x = !packs_alike(&plan.experts, &plan.gate);
    plan_shared(&plan.shared, s, l, &plan.gate, threads);
    arena memory = {.used = UP_TO(sizeof plan, 64)};
    cut_experts(&plan, &memory);
    experts_half *h = take_memory(memory.used);
    if (!h) return NULL;
    *h = plan;
    memory = (arena){.at = (uint8_t *)h, .used = UP_TO(sizeof plan, 64)};
    cut_experts(h, &memory);
    h->gate.experts = &h->matrix, h->gate.starts = h->gate_starts;
    h->experts.experts = h->called, h->experts.starts = h->starts, h->experts.token_of = h->token_of;
    h->work = (work){
        .pieces = {packing_pieces(s), first_pieces(&h->gate) + shared_gate_pieces(&h->shared), packing_pieces(s), 1,
                   first_pieces(&h->experts) + shared_first_pieces(&h->shared),
                   last_pieces(&h->experts) + shared_last_pieces(&h->shared), packing_pieces(s)},
        .run_piece = experts_half_piece, .ended_ns = s->ended_ns,
    };
    h->work.memory_bytes = norm_memory(s);
    if (routing_memory(s) > h->work.memory_bytes) h->work.memory_bytes = routing_memory(s);
    if (mixing_memory(s) > h->work.memory_bytes) h->work.memory_bytes = mixing_memory(s);
    return h;
}

/* The same at once. */
int sage_experts_half(
    const step *s, const layer *l, const void *hidden, void *out, int64_t *chosen, float *weights, int64_t *used,
    int64_t *num_used, run_in_threads *run,
    unsigned threads
) {
    void *h = sage_begin_experts(s, l, hidden, out, chosen, weights, used, num_used, run ? threads : 1);
    const int code = h ? sage_run_half(h, 0, run, threads) : OUT_OF_MEMORY;
    sage_end_half(h);
    return code;
}

typedef struct {
    work work;
    step step;
    const uint8_t *hidden, *norm;
    call product;
    int64_t *best;
} head;

static void head_piece(work *w, int phase, int64_t piece, void *memory) {
    const head *h = (const head *)w;
    if (phase == 0)
        pack_normed(&h->step, h->hidden, h->norm, (const call *[MOST_PACKED]){&h->product}, NULL, piece, memory);
    else if (phase == 1) product_piece(&h->product, piece);
    else {
        const int64_t outputs = h->product.first.outputs;
        h->best[piece] = h->product.level->find_largest((const float *)h->product.out + piece * outputs, outputs);
    }
}

/* Logits of rows (rows, width) after their norm: (rows, outputs) float32, rounded to the rows' dtype on the way.
   matrix: the head's. best: the first of the largest logits of each row, -1 where one is not finite. */
int sage_head(
    int level, int is_narrow, const void *hidden, int64_t num_rows, int64_t width, const void *norm, float eps,
    const linear *matrix, float *logits, int64_t *best, run_in_threads *run, unsigned threads
) {
    expert one;
    int64_t starts[2];
    head h = {
        .step = {.level = level, .is_narrow = is_narrow, .width = width, .num_tokens = num_rows, .eps = eps},
        .hidden = hidden, .norm = norm, .best = best,
    };
    h.product = one_product(&h.step, matrix, run ? threads : 1, &one, starts);
    h.product.is_widened = true;
    h.product.out = (uint8_t *)logits, h.product.out_stride = matrix->form.outputs * (int64_t)sizeof(float);
    h.product.x = take_memory((size_t)(num_rows * h.product.x_stride));
    if (!h.product.x) return OUT_OF_MEMORY;
    h.work = (work){
        .pieces = {packing_pieces(&h.step), first_pieces(&h.product), num_rows}, .run_piece = head_piece,
        .memory_bytes = norm_memory(&h.step),
    };
    const int code = run_work(&h.work, run, threads);
    give_memory(h.product.x);
    return code;
}
