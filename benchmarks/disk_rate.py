"""How fast the disk gives expert records, past the page cache; and emptying the cache of files."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from experts.store import ExpertStore

PAGE = 4096
DEPTHS = (2, 4, 8)
"""Readers at once; the best rate counts."""


def disk_bytes_per_s(store: ExpertStore, num_records: int, seed: int) -> float:
    """Rate of O_DIRECT reads of whole records, in random order, by several threads, into buffers that are reused."""
    rng = random.Random(seed)
    records = [store.record(key) for key in store.expert_keys()]
    chosen = [records[i] for i in rng.choices(range(len(records)), k=num_records)]
    places = [(store.root / record.parts[0].file, record.parts[0].offset, record.nbytes) for record in chosen]
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in {place[0] for place in places}}
    try:
        reads = [(descriptors[path], offset, nbytes) for path, offset, nbytes in places]
        return max(_rate(reads, depth) for depth in DEPTHS)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _rate(reads: Sequence[tuple[int, int, int]], depth: int) -> float:
    """Reads start at pages and are rounded up to whole ones."""
    largest = max(nbytes for _, _, nbytes in reads) + PAGE

    def run(mine: Sequence[tuple[int, int, int]]) -> None:
        with mmap.mmap(-1, -(-largest // PAGE) * PAGE) as buffer:
            for descriptor, offset, nbytes in mine:
                with memoryview(buffer) as view:
                    os.preadv(descriptor, [view[: -(-nbytes // PAGE) * PAGE]], offset)

    threads = [threading.Thread(target=run, args=(reads[number::depth],)) for number in range(depth)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(nbytes for _, _, nbytes in reads) / (time.perf_counter() - started)


def forget_files(paths: Iterable[Path]) -> None:
    """Drop what the page cache holds of these files; pages that a living process has mapped stay."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
