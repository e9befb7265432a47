/* Memory of calls, aligned to 64 bytes. */
#ifndef SAGE_MEMORY_H
#define SAGE_MEMORY_H

#include <stddef.h>

void *take_memory(size_t bytes); /* with anything in it; NULL where there is none */
void give_memory(void *memory);  /* what was taken, or NULL */

#endif
