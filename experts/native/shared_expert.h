/* The expert that every row of a layer passes, whatever it is routed to, and the gate by which its rows are scaled. Its
   pieces go with those of the layer's gate, and of its experts; see layer.c and dispatch.c. */
#ifndef SAGE_SHARED_EXPERT_H
#define SAGE_SHARED_EXPERT_H

#include "layer.h"

/* What threads share; both calls have all of the step's rows. */
typedef struct {
    bool is_there, has_own_x;
    call gate, rows;
    expert of_gate, of_rows; /* as calls take them */
    int64_t starts[2];
} shared_expert;

/* Where two calls take their rows packed alike. */
bool packs_alike(const call *one, const call *other);

/* of_layer: the call of the layer's gate, whose packed rows are used again where they can be. */
void plan_shared(shared_expert *p, const step *s, const layer *l, const call *of_layer, unsigned threads);

/* Memory for it but for its results, whose places are given; NULL: also for these. After plan_shared or a copy. */
void cut_shared(shared_expert *p, const step *s, const call *of_layer, arena *a, uint8_t *gates, uint8_t *rows);

/* Pieces of the gate, of the first product, and of the last: 0 where there is none. */
int64_t shared_gate_pieces(const shared_expert *p);
int64_t shared_first_pieces(const shared_expert *p);
int64_t shared_last_pieces(const shared_expert *p);

#endif
