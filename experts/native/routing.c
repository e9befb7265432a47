/* The checkpoint's own routing: softmax over all experts in float32, then the best ones. A row's bits depend on its
   logits alone; of equal probabilities the lower expert comes first.

   Called by router/native_routing.py, which has checked pointers and shapes. */
#include "routing.h"

#include <math.h>
#include <stdlib.h>

#define ROWS_ROUTED 16

void route_row(
    const level *level, bool is_narrow, const uint8_t *logits, int64_t num_experts, int64_t top_k, bool is_normalised,
    int64_t *chosen, float *weights, float *memory
) {
    const int64_t padded = UP_TO(num_experts, UNIT);
    level->read_row(is_narrow, logits, memory, num_experts);
    for (int64_t e = num_experts; e < padded; e++) memory[e] = -INFINITY;
    level->softmax(memory, padded);
    int64_t count = 0;
    for (int64_t e = 0; e < num_experts; e++) {
        const float p = memory[e];
        if (count == top_k && !(p > weights[top_k - 1])) continue;
        int64_t place = count < top_k ? count++ : top_k - 1;
        for (; place > 0 && p > weights[place - 1]; place--)
            weights[place] = weights[place - 1], chosen[place] = chosen[place - 1];
        weights[place] = p, chosen[place] = e;
    }
    if (!is_normalised) return;
    float sum = 0;
    for (int64_t k = 0; k < top_k; k++) sum += weights[k];
    for (int64_t k = 0; k < top_k; k++) weights[k] /= sum;
}

int64_t sort_by_expert(
    const int64_t *chosen, int64_t num_rows, int64_t top_k, int64_t num_experts, int64_t *used, int64_t *starts,
    int64_t *row_of, int64_t *token_of
) {
    const int64_t slots = num_rows * top_k;
    int64_t num_used = 0, row = 0;
    memset(starts, 0, (size_t)(num_experts + 1) * sizeof *starts);
    for (int64_t s = 0; s < slots; s++) starts[chosen[s]]++;
    for (int64_t e = 0; e < num_experts; e++) { /* for now by expert: where its next row goes */
        const int64_t count = starts[e];
        starts[e] = row, row += count;
        if (count) used[num_used++] = e;
    }
    for (int64_t s = 0; s < slots; s++) {
        row_of[s] = starts[chosen[s]]++;
        token_of[row_of[s]] = s / top_k;
    }
    for (int64_t i = 0, begin = 0; i <= num_experts; i++) { /* each one's rows end where they were counted to */
        const int64_t end = i < num_used ? starts[used[i]] : slots;
        starts[i] = begin, begin = end;
    }
    return num_used;
}

typedef struct {
    work work;
    const level *level;
    bool is_narrow, is_normalised;
    const uint8_t *logits;
    int64_t num_rows, num_experts, stride, top_k, *chosen;
    float *weights;
} routing;

static void routing_piece(work *w, int phase, int64_t piece, void *memory) {
    (void)phase;
    const routing *r = (const routing *)w;
    const int64_t end = MIN(r->num_rows, (piece + 1) * ROWS_ROUTED);
    for (int64_t row = piece * ROWS_ROUTED; row < end; row++)
        route_row(
            r->level, r->is_narrow, r->logits + row * r->stride, r->num_experts, r->top_k, r->is_normalised,
            r->chosen + row * r->top_k, r->weights + row * r->top_k, memory);
}

/* logits: (rows, experts), stride bytes apart. chosen, weights: (rows, top_k). */
int sage_route(
    int level, int is_narrow, const void *logits, int64_t num_rows, int64_t num_experts, int64_t stride, int64_t top_k,
    int is_normalised, int64_t *chosen, float *weights, run_in_threads *run, unsigned threads
) {
    routing r = {
        .level = level_of(level), .is_narrow = is_narrow, .is_normalised = is_normalised, .logits = logits,
        .num_rows = num_rows, .num_experts = num_experts, .stride = stride, .top_k = top_k, .chosen = chosen,
        .weights = weights,
    };
    r.work.pieces[0] = (num_rows + ROWS_ROUTED - 1) / ROWS_ROUTED;
    r.work.run_piece = routing_piece;
    r.work.memory_bytes = (size_t)UP_TO(num_experts, UNIT) * sizeof(float);
    return run_work(&r.work, r.work.pieces[0] > 1 ? run : NULL, threads);
}
