"""Memory for weights: as large as asked for, writable, apart from other memory."""

from __future__ import annotations

import torch

from experts.buffers import ALIGNMENT, SLAB_BYTES, BufferPool
from experts.huge_pages import HUGE_BYTES, huge_bytes, joined, weight_bytes


def test_memory_has_the_size_that_was_asked_for() -> None:
    for nbytes in (1, 5000, HUGE_BYTES, HUGE_BYTES + 3):
        for memory in (huge_bytes(nbytes), weight_bytes(nbytes)):
            assert memory.shape == (nbytes,) and memory.dtype == torch.uint8
            assert memory.fill_(7).sum() == 7 * nbytes


def test_joined_matrices_are_those_of_cat() -> None:
    for rows in (2, 700):
        parts = [torch.randn(rows, 1024), torch.randn(3, 1024)]
        assert torch.equal(joined(parts), torch.cat(parts))
    assert joined(parts[:1]) is parts[0]


def test_small_buffers_that_stay_lie_side_by_side_and_do_not_overlap() -> None:
    pool = BufferPool(None)
    nbytes = SLAB_BYTES // 3 - 1
    small = nbytes // 16
    buffers = [pool.take(small, is_for_good=True) for _ in range(60)]
    for value, buffer in enumerate(buffers):
        buffer.fill_(value)
    assert all((buffer == value).all() for value, buffer in enumerate(buffers))
    assert all(buffer.data_ptr() % ALIGNMENT == 0 and buffer.shape == (small,) for buffer in buffers)
    assert buffers[1].data_ptr() - buffers[0].data_ptr() < small + ALIGNMENT
    assert pool.allocated_bytes == 60 * small
