/* The data plane's frames as docs/wire-format.md has them and experts/frame.py checks them: pure, bytes in, values out. */
#ifndef SAGE_FRAMES_H
#define SAGE_FRAMES_H

#include <stdbool.h>
#include <stdint.h>

#define HEADER_BYTES 64
#define MOST_TRACE_BYTES 64

enum frame_kind { CALL_FRAME = 5, ROWS_FRAME = 6 };

/* What is in front of every body, little-endian as this processor's numbers are: elsewhere Python alone reads frames. */
typedef struct {
    uint8_t magic[4], version, kind, dtype_code, trace_bytes;
    uint16_t component, error_code;
    uint32_t layer;
    uint64_t incarnation, sequence;
    uint32_t deadline_us, num_tokens, num_rows, num_experts, width, body_bytes;
    uint64_t reserved;
} frame_header;

_Static_assert(sizeof(frame_header) == HEADER_BYTES, "a header has no gaps");

/* What both ends of a connection hold each other to. Written down in experts/native_plane.py too. */
typedef struct {
    uint8_t magic[4], version, dtype_code, unused[2];
    uint32_t width, row_bytes, max_rows, num_components;
    uint64_t incarnation;
    uint8_t heartbeat[HEADER_BYTES]; /* the peer's, a whole frame */
} agreement;

/* Bytes behind a call's header and before its activations. */
static inline int64_t map_bytes(const frame_header *h) {
    return 4 * (2 * (int64_t)h->num_experts + h->num_rows) + h->trace_bytes;
}

/* A header of a kind with what every frame of the connection says; the rest is zero. */
frame_header new_header(const agreement *a, int kind, uint64_t sequence);

/* Whether this header may begin call number `sequence`, and nothing else. */
bool may_begin_call(const frame_header *h, const agreement *a, uint64_t sequence);

/* Whether experts, counts, row map and trace are what a call with this header may hold. */
bool are_sound_maps(const frame_header *h, const uint8_t *maps);

#endif
