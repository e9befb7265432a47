/* Levels, packing, and who takes which piece of work. */
#include "work.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

static int detected_level(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* Raised with every change of what is computed. */
int sage_version(void) { return 7; }

/* The best level of this machine: 0 portable, 1 avx2, 2 avx512, 3 avx512bf16. */
int sage_level(void) { return detected_level(); }

const level *level_of(int number) {
#ifdef __x86_64__
    static const level *const levels[] = {&portable_level, &avx2_level, &avx512_level, &avx512bf16_level};
    if (number > 0) return levels[number];
#endif
    (void)number;
    return &portable_level;
}

/* One row, widened or not, in the way's order of inputs, with zeros behind. */
void pack_row(const way *way, bool is_narrow, const void *from, uint8_t *to, int64_t count) {
    if (way->pack) {
        way->pack(from, to, count);
        return;
    }
    const int64_t end = UP_TO(count, STEP);
    const bool is_widened = is_narrow && way->x_bytes == 4;
    if (!way->pairs && !is_widened) {
        memcpy(to, from, (size_t)(count * way->x_bytes));
        memset(to + count * way->x_bytes, 0, (size_t)((end - count) * way->x_bytes));
        return;
    }
    const int64_t pairs = way->pairs ? way->pairs : STEP, half = pairs / 2;
    const int64_t forward = way->pairs ? 2 : 1, other = way->pairs ? 1 : half;
    for (int64_t first = 0; first < end; first += pairs)
        for (int64_t i = 0; i < half; i++) {
            const int64_t places[2] = {first + i, first + half + i};
            const int64_t sources[2] = {first + forward * i, first + forward * i + other};
            for (int k = 0; k < 2; k++) {
                const bool is_there = sources[k] < count;
                if (way->x_bytes == 2)
                    ((uint16_t *)to)[places[k]] = is_there ? ((const uint16_t *)from)[sources[k]] : 0;
                else if (is_narrow)
                    ((float *)to)[places[k]] = is_there ? from_bfloat16(((const uint16_t *)from)[sources[k]]) : 0;
                else
                    ((float *)to)[places[k]] = is_there ? ((const float *)from)[sources[k]] : 0;
            }
        }
}

int64_t packed_stride(const way *way, int64_t inputs) {
    return UP_TO(inputs, way->block ? way->block : STEP) * way->x_bytes + 64; /* rows a page apart would compete for the same places in the caches */
}

int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

static void take_pieces(void *data) {
    work *w = data;
    void *memory = NULL;
    if (w->memory_bytes && !(memory = aligned_alloc(64, UP_TO(w->memory_bytes, 64)))) {
        atomic_store(&w->has_failed, true); /* others go on; where nobody has memory, nothing is done */
        return;
    }
    for (bool is_first = true; is_first || !w->until_ns || now_ns() < w->until_ns; is_first = false) {
        int64_t piece = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        int phase = 0;
        while (phase < PHASES && piece >= w->pieces[phase]) piece -= w->pieces[phase++];
        if (phase == PHASES) break;
        for (int earlier = 0; earlier < phase; earlier++)
            for (int spins = 0;
                 atomic_load_explicit(&w->done[earlier], memory_order_acquire) < w->pieces[earlier]; spins++)
                if (spins > 1000) sched_yield();
        w->run_piece(w, phase, piece, memory);
        const int64_t done = 1 + atomic_fetch_add_explicit(&w->done[phase], 1, memory_order_release);
        if (w->ended_ns && done == w->pieces[phase]) w->ended_ns[phase] = now_ns();
    }
    free(memory);
}

/* All pieces, each once, or PAUSED where some are left for another call. Returns OUT_OF_MEMORY where some thread had none;
   results are then not to be used. */
int run_work(work *w, run_in_threads *run, unsigned threads) {
    if (run && threads > 1) run(take_pieces, w, threads, 0);
    else take_pieces(w);
    if (atomic_load(&w->has_failed)) return OUT_OF_MEMORY;
    for (int phase = 0; phase < PHASES; phase++)
        if (atomic_load(&w->done[phase]) < w->pieces[phase]) return PAUSED;
    return 0;
}
