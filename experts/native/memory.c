/* Memory of calls. Many rows need tens of MB, and what is given back to the system comes again page by page, each filled
   with zeros first: a few per cent of a prompt's time. So large blocks are kept for the next call, and lie in large pages
   where the system has some. Any thread may take and give. */
#include "memory.h"

#include "products.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#define LARGE ((size_t)2 << 20) /* a large page */
#define KEPT 2                  /* blocks at most: of a pass that pauses, and of what is computed meanwhile */
#define FRONT 64                /* bytes before what is handed out: the block's size */

static _Atomic(uint8_t *) kept[KEPT];

static size_t size_of(const uint8_t *block) { return *(const size_t *)block; }

static uint8_t *new_block(size_t bytes) {
    const size_t unit = bytes < LARGE ? 64 : LARGE, size = UP_TO(bytes, unit);
    uint8_t *block = aligned_alloc(unit, size);
    if (!block) return NULL;
#ifdef MADV_HUGEPAGE
    if (size >= LARGE) (void)madvise(block, size, MADV_HUGEPAGE); /* where there are none, in small ones */
#endif
    *(size_t *)block = size;
    return block;
}

/* Keeps the largest ones: they are large enough most often. */
static void put_back(uint8_t *block) {
    for (int i = 0; i < KEPT && block; i++) {
        const size_t size = size_of(block); /* while it is still ours */
        uint8_t *other = atomic_exchange(&kept[i], block);
        block = other && size_of(other) > size ? atomic_exchange(&kept[i], other) : other;
    }
    free(block);
}

void *take_memory(size_t bytes) {
    bytes += FRONT;
    uint8_t *block = NULL;
    for (int i = 0; i < KEPT && bytes >= LARGE; i++) {
        block = atomic_exchange(&kept[i], NULL);
        if (block && size_of(block) >= bytes) return block + FRONT;
        if (block) put_back(block);
    }
    block = new_block(bytes);
    return block ? block + FRONT : NULL;
}

void give_memory(void *memory) {
    if (!memory) return;
    uint8_t *block = (uint8_t *)memory - FRONT;
    if (size_of(block) < LARGE) free(block);
    else put_back(block);
}
