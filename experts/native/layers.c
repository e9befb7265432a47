/* Layers one after another in one call, where nobody looks at anything between them: the two halves of each, as layer.c
   computes them, so with the same bits. What is saved is the way back to the caller and what it does there, which a step
   of a small model's few rows mostly consists of.

   Called by router/native_step.py, which has checked pointers, shapes, block numbers and limits. */
#include "layer.h"

/* One of the layers, and where its keys and values are. */
typedef struct {
    const layer *layer;
    int64_t index, window; /* of the layer in the cache; 0 for none */
} placed_layer;

/* `count` layers of (tokens, width) rows in the model's dtype: from hidden to out; between the halves of a layer they are
   in middle. By layer that has experts: chosen and weights (tokens, top_k), as sage_begin_experts leaves them, and used
   (num_experts + 1), the experts in use, ascending, behind the room for all of them how many. spent_ns: of attention's
   halves, and of the others. Returns 0 or OUT_OF_MEMORY. */
int sage_run_layers(
    const step *s, const placed_layer *layers, int64_t count, const void *hidden, void *middle, void *out,
    int64_t *chosen, float *weights, int64_t *used, int64_t *spent_ns, run_in_threads *run, unsigned threads
) {
    const int64_t slots = s->num_tokens * s->top_k;
    step half = *s;
    int code = 0;
    int64_t began = now_ns();
    spent_ns[0] = spent_ns[1] = 0;
    for (int64_t i = 0; i < count && !code; i++) {
        const placed_layer *p = &layers[i];
        int64_t *used_here = used + i * (s->num_experts + 1);
        if (s->ended_ns) half.ended_ns = s->ended_ns + 2 * i * PHASES;
        code = sage_attention_half(&half, p->layer, p->index, p->window, i ? out : hidden, middle, run, threads);
        const int64_t attended = now_ns();
        if (s->ended_ns) half.ended_ns += PHASES;
        if (!code && !p->layer->gate.matrix.weights)
            code = sage_dense_half(&half, p->layer, middle, out, run, threads);
        else if (!code) code = sage_experts_half(
            &half, p->layer, middle, out, chosen + i * slots, weights + i * slots, used_here,
            used_here + s->num_experts, run, threads);
        const int64_t ended = now_ns();
        spent_ns[0] += attended - began, spent_ns[1] += ended - attended;
        began = ended;
    }
    return code;
}
