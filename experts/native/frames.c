/* What a frame is checked for, as in experts/frame.py. Nothing is read behind what the caller says is there. */
#include "frames.h"

#include <string.h>

frame_header new_header(const agreement *a, int kind, uint64_t sequence) {
    frame_header h = {
        .version = a->version, .kind = (uint8_t)kind, .dtype_code = a->dtype_code, .incarnation = a->incarnation,
        .sequence = sequence, .width = a->width,
    };
    memcpy(h.magic, a->magic, sizeof h.magic);
    return h;
}

bool may_begin_call(const frame_header *h, const agreement *a, uint64_t sequence) {
    if (h->num_rows < 1 || h->num_rows > a->max_rows || h->num_tokens < 1 || h->num_tokens > a->max_rows) return false;
    if (h->num_experts < 1 || h->num_experts > h->num_rows || h->component >= a->num_components) return false;
    if (h->trace_bytes > MOST_TRACE_BYTES || !h->deadline_us) return false;
    frame_header expected = new_header(a, CALL_FRAME, sequence);
    expected.trace_bytes = h->trace_bytes, expected.component = h->component, expected.layer = h->layer;
    expected.deadline_us = h->deadline_us, expected.num_tokens = h->num_tokens, expected.num_rows = h->num_rows;
    expected.num_experts = h->num_experts;
    const int64_t body = map_bytes(h) + (int64_t)h->num_tokens * a->row_bytes;
    expected.body_bytes = (uint32_t)body; /* an agreement has no frame whose body is longer than it can say */
    return !memcmp(h, &expected, sizeof expected);
}

static uint32_t number_at(const uint8_t *maps, int64_t index) {
    uint32_t number;
    memcpy(&number, maps + 4 * index, sizeof number);
    return number;
}

bool are_sound_maps(const frame_header *h, const uint8_t *maps) {
    const int64_t experts = h->num_experts, rows = h->num_rows;
    int64_t covered = 0;
    for (int64_t i = 0; i < experts; i++) {
        if (i && number_at(maps, i) <= number_at(maps, i - 1)) return false;
        const uint32_t count = number_at(maps, experts + i);
        if (!count) return false;
        covered += count;
    }
    if (covered != rows) return false;
    for (int64_t r = 0; r < rows; r++)
        if (number_at(maps, 2 * experts + r) >= h->num_tokens) return false;
    const uint8_t *trace = maps + 4 * (2 * experts + rows);
    for (int64_t i = 0; i < h->trace_bytes; i++)
        if (trace[i] < ' ' || trace[i] > '~') return false;
    return true;
}
