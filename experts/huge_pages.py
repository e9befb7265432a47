"""Memory for weights in large pages, where the system gives them.

A step streams weights from end to end. In pages of 4 KB the processor looks up another address every 4 KB, which on a
virtual machine costs about as much as reading the page; in pages of 2 MB it hardly ever does. The system is asked, not
forced: where it has no large pages left, or was told not to give any, the memory is in small ones. Used by
`experts.buffers`, `experts.store` and whoever joins matrices.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE_BYTES = 1 << 21


def huge_bytes(nbytes: int) -> Tensor:
    """A uint8 tensor of zeros in a mapping of its own, which goes back to the system as a whole when it is let go."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE_BYTES:
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def weight_bytes(nbytes: int) -> Tensor:
    """A uint8 tensor with anything in it, in large pages where it fills one."""
    return huge_bytes(nbytes) if nbytes >= HUGE_BYTES else torch.empty(nbytes, dtype=torch.uint8)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other, as `torch.cat`, in memory for weights where they are on the CPU. One alone is not copied."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    nbytes = sum(tensor.nbytes for tensor in tensors)
    if not nbytes or first.device.type != "cpu":
        return torch.cat(list(tensors))
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    return torch.cat(list(tensors), out=weight_bytes(nbytes).view(first.dtype).view(shape))
