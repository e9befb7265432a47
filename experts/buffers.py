"""Memory that experts are read into: taken once and used again, within the bytes that it may hold.

Used by `experts.cache` and `experts.device_tier`, under the worker's lock.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from experts.huge_pages import HUGE_BYTES, huge_bytes

MIN_MAPPED_BYTES = 1 << 20
"""Smaller buffers have no mapping of their own, which would waste half a page each."""
SLAB_BYTES = 4 * HUGE_BYTES
"""What small buffers that are never given back are cut from."""
ALIGNMENT = 64


class HostMemory(Protocol):
    """Where buffers come from."""

    def take(self, nbytes: int, *, is_aligned: bool) -> Tensor:
        """uint8, with anything in it; is_aligned: at a block."""
        ...

    def release(self, buffer: Tensor) -> None:
        """A buffer that was taken is about to be forgotten; nobody looks into it any more."""
        ...


class PlainMemory:
    def take(self, nbytes: int, *, is_aligned: bool) -> Tensor:
        if is_aligned or nbytes >= MIN_MAPPED_BYTES:
            # Goes back to the system as a whole when it is no longer used, unlike memory from a heap.
            return huge_bytes(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def release(self, buffer: Tensor) -> None:
        """Python does the rest."""


PLAIN_MEMORY = PlainMemory()


class DeviceMemory:
    """Of a device; PyTorch's allocator keeps what goes for what comes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, nbytes: int, *, is_aligned: bool) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def release(self, buffer: Tensor) -> None:
        """Nothing: the allocator waits for what was given to the device before."""


class BufferPool:
    """Buffers by size. Those given back are handed out again before new memory is taken."""

    def __init__(
        self, limit_bytes: int | None, *, is_aligned: bool = False, memory: HostMemory = PLAIN_MEMORY
    ) -> None:
        """limit_bytes: of used and free buffers together; None means no bound, and nothing is kept.

        is_aligned: whether buffers must begin at a block, as reads past the page cache need it.
        """
        self._memory = memory
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
        is_small = not self._is_aligned and nbytes < MIN_MAPPED_BYTES
        if is_for_good and is_small and self._limit_bytes is None and self._memory is PLAIN_MEMORY:
            return self._cut(nbytes)
        return self._memory.take(nbytes, is_aligned=self._is_aligned)

    def _cut(self, nbytes: int) -> Tensor:
        if nbytes > len(self._slab):
            self._slab = huge_bytes(SLAB_BYTES)
        buffer, self._slab = self._slab[:nbytes], self._slab[-(-nbytes // ALIGNMENT) * ALIGNMENT :]
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Hand back a buffer that nobody looks into any more."""
        if self._limit_bytes is None:
            self.allocated_bytes -= buffer.numel()
            self._memory.release(buffer)
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
                self._memory.release(free.pop())
                self.allocated_bytes -= nbytes
