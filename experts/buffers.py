"""Memory that experts are read into: taken once and used again, within the bytes that it may hold.

Used by `experts.worker`, under its lock.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.huge_pages import HUGE_BYTES, huge_bytes

MIN_MAPPED_BYTES = 1 << 20
"""Smaller buffers have no mapping of their own, which would waste half a page each."""
SLAB_BYTES = 4 * HUGE_BYTES
"""What small buffers that are never given back are cut from."""
ALIGNMENT = 64


class BufferPool:
    """Buffers by size. Those given back are handed out again before new memory is taken."""

    def __init__(self, limit_bytes: int | None, *, is_aligned: bool = False) -> None:
        """limit_bytes: of used and free buffers together; None means no bound, and nothing is kept.

        is_aligned: whether buffers must begin at a block, as reads past the page cache need it.
        """
        self.allocated_bytes = 0
        self._limit_bytes = limit_bytes
        self._is_aligned = is_aligned
        self._free: dict[int, list[Tensor]] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int, *, is_for_good: bool = False) -> Tensor:
        """A uint8 buffer with anything in it. The caller sees to it that used buffers stay within the limit.

        is_for_good: it will not be given back, where there is no bound; memory of one that is may stay with others'.
        """
        free = self._free.get(nbytes)
        if free:
            return free.pop()
        if self._limit_bytes is not None:
            self._shrink(self._limit_bytes - nbytes)
        self.allocated_bytes += nbytes
        if self._is_aligned or nbytes >= MIN_MAPPED_BYTES:
            # Goes back to the system as a whole when it is no longer used, unlike memory from a heap.
            return huge_bytes(nbytes)
        if is_for_good and self._limit_bytes is None:
            return self._cut(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def _cut(self, nbytes: int) -> Tensor:
        if nbytes > len(self._slab):
            self._slab = huge_bytes(SLAB_BYTES)
        buffer, self._slab = self._slab[:nbytes], self._slab[-(-nbytes // ALIGNMENT) * ALIGNMENT :]
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Hand back a buffer that nobody looks into any more."""
        if self._limit_bytes is None:
            self.allocated_bytes -= buffer.numel()
        else:
            self._free.setdefault(buffer.numel(), []).append(buffer)

    def set_limit(self, limit_bytes: int) -> None:
        """Another limit, where there was one; free buffers beyond it go at once. Used ones are the caller's."""
        self._limit_bytes = limit_bytes
        self._shrink(limit_bytes)

    def _shrink(self, target_bytes: int) -> None:
        """Let free buffers of other sizes go until no more than the target is held."""
        for nbytes, free in self._free.items():
            while free and self.allocated_bytes > target_bytes:
                free.pop()
                self.allocated_bytes -= nbytes
