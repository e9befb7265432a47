"""How many cores a process may use, and for which experts more than one of them is of use.

Imports nothing: processes that compute nothing, but plan for those that do, need no PyTorch for it.
"""

from __future__ import annotations

import os

SMALL_MATRIX_ELEMENTS = 1 << 20
"""Below this a product with a few rows takes less time than waking a second thread: at 98,304 elements one thread
was 1.5 to 3 times as fast as two, at 1.5 million both were equal (2 cores, AVX-512, passive waiting)."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def useful_threads(available: int, matrix_elements: int) -> int:
    """How many of the available threads to compute with, for experts whose largest matrix has this many elements.

    Changes speed only: `calibrate` proves that the number of threads changes no bit.
    """
    return 1 if matrix_elements < SMALL_MATRIX_ELEMENTS else max(1, available)
