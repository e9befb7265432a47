/* Work that threads share, and what products and attention do with rows. */
#ifndef SAGE_WORK_H
#define SAGE_WORK_H

#include "products.h"

#include <stdatomic.h>
#include <stdbool.h>

#define PHASES 7 /* at most */
#define OUT_OF_MEMORY 1
#define PAUSED 2
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* GOMP_parallel of the OpenMP runtime that the process has already. */
typedef void run_in_threads(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* Numbered pieces in phases; threads take the next number. A piece of a later phase waits until the phases before are
   complete, which threads that never woke up cannot delay. First member of what a call's pieces need. It may pause between
   any two pieces. */
typedef struct work work;
struct work {
    _Atomic int64_t next, done[PHASES];
    atomic_bool has_failed;
    int64_t pieces[PHASES];
    void (*run_piece)(work *, int phase, int64_t piece, void *memory);
    size_t memory_bytes; /* of each thread's memory */
    int64_t *ended_ns;   /* (PHASES): clock at each one's end; or NULL */
    int64_t until_ns;    /* clock after which no thread takes another piece, but for its first one; or 0 */
};

/* How many of `left` rows the next tile takes: as even as possible, which changes no bit. */
static inline int next_rows(int64_t left, int most) {
    const int64_t tiles = (left + most - 1) / most;
    return (int)((left + tiles - 1) / tiles);
}

int64_t now_ns(void); /* by the monotonic clock */
int run_work(work *w, run_in_threads *run, unsigned threads);
const level *level_of(int number);
void pack_row(const way *way, bool is_narrow, const void *from, uint8_t *to, int64_t count);
int64_t packed_stride(const way *way, int64_t inputs);

#endif
