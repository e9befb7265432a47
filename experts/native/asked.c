/* Layers one after another in one call, where the experts of each are asked for over sockets and nobody looks at anything
   between them: attention and the gate as layer.c and dispatch.c compute them, so with the same bits. It ends at the first
   answer that is not the right one in time; then that layer's call lies where sage_dispatch leaves it.

   Called by router/native_dispatch.py, which has checked pointers, shapes, block numbers and limits. */
#include "exchange.h"
#include "layer.h"
#include "memory.h"

/* One of the layers, where its keys and values are, and who has its experts. */
typedef struct {
    const layer *layer;
    int64_t index, window; /* of the layer in the cache; 0 for none */
    int64_t number;        /* as frames have it */
    const uint8_t *owners;
} asked_layer;

/* `count` layers, of which x->num_done are done but for the sum of the last one's rows. hidden: the first one's input; or,
   with rows_before, what the rows of the layer before are added to. before, after: see sage_reach_experts. to: as there,
   but chosen and weights have room for all layers, and with rows_before those of the layer before lie before them. rows:
   of the last layer's call. errands: (layers, peers). spent_ns: of attention. Returns 0 or OUT_OF_MEMORY. */
int sage_ask_layers(
    const step *s, const asked_layer *layers, int64_t count, const void *hidden, const void *rows_before, void *before,
    void *after, const dispatched *to, exchange *x, void *rows, errand *errands, int64_t *spent_ns, run_in_threads *run,
    unsigned threads
) {
    const int64_t slots = s->num_tokens * s->top_k, row_bytes = s->width * (s->is_narrow ? 2 : 4);
    void *memory = take_memory((size_t)asking_bytes(x, MIN(s->num_experts, slots), slots, s->num_tokens, row_bytes));
    int code = memory ? 0 : OUT_OF_MEMORY;
    bool is_well = true;
    *spent_ns = x->num_done = 0;
    for (int64_t i = 0; i < count && is_well && !code; i++) {
        const asked_layer *l = &layers[i];
        dispatched here = *to;
        here.chosen += i * slots, here.weights += i * slots;
        if (rows_before) {
            dispatched earlier = here;
            earlier.weights -= slots;
            code = sage_combine(s, hidden, rows_before, &earlier, before, run, threads);
            hidden = before;
        }
        const int64_t began = now_ns();
        if (!code) code = sage_attention_half(s, l->layer, l->index, l->window, hidden, after, run, threads);
        *spent_ns += now_ns() - began;
        if (!code) code = sage_dispatch(s, l->layer, after, &here, run, threads);
        if (code) break;
        const question q = {
            .layer = l->number, .owners = l->owners, .maps = here.maps, .num_experts = *here.num_used, .num_rows = slots,
            .num_tokens = s->num_tokens, .tokens = here.normed, .row_bytes = row_bytes,
        };
        is_well = ask_peers(x, &q, s->is_narrow, rows, errands + i * x->num_peers, memory);
        x->num_done += is_well;
        hidden = after, rows_before = rows;
    }
    give_memory(memory);
    return code;
}
