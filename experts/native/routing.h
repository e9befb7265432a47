/* From gate logits to the experts of each row, and to rows sorted by expert. */
#ifndef SAGE_ROUTING_H
#define SAGE_ROUTING_H

#include "work.h"

#define UNIT 16 /* scores are padded to a multiple of it */

/* memory: UP_TO(num_experts, UNIT) floats. chosen, weights: top_k each, best first. */
void route_row(
    const level *level, bool is_narrow, const uint8_t *logits, int64_t num_experts, int64_t top_k, bool is_normalised,
    int64_t *chosen, float *weights, float *memory);

/* Slots (row, rank) by expert, rows ascending within one. chosen: (rows, top_k). used, starts: (num_experts + 1) each;
   those behind the last used one begin at the end. row_of: each slot's output row. token_of: each output row's row.
   Returns how many experts are used. */
int64_t sort_by_expert(
    const int64_t *chosen, int64_t num_rows, int64_t top_k, int64_t num_experts, int64_t *used, int64_t *starts,
    int64_t *row_of, int64_t *token_of);

#endif
