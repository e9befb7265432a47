"""Attention against a plain reference, and its indifference to batch, chunk and padding."""

from __future__ import annotations

import pytest
import torch

from router.attention import BLOCK_POSITIONS, MAX_SCORE_ELEMENTS, attend, tree_sum


def _case(num_sets: int, num_rows: int, num_blocks: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * 31 + num_blocks)
    q = torch.randn(num_sets, num_rows, head_dim, generator=generator) * head_dim**-0.5
    keys = torch.randn(num_sets, num_blocks, BLOCK_POSITIONS, head_dim, generator=generator)
    values = torch.randn(num_sets, num_blocks, BLOCK_POSITIONS, head_dim, generator=generator)
    limits = torch.randint(1, num_blocks * BLOCK_POSITIONS + 1, (num_sets, num_rows), generator=generator)
    return q, keys, values, limits


@pytest.mark.parametrize("head_dim", [16, 32, 80, 128])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7])
def test_result_agrees_with_plain_attention(head_dim: int, num_blocks: int) -> None:
    q, keys, values, limits = _case(3, 16, num_blocks, head_dim)
    out = attend(q, keys, values, limits)
    scores = q.double() @ keys.flatten(1, 2).double().transpose(1, 2)
    visible = torch.arange(num_blocks * BLOCK_POSITIONS) < limits.unsqueeze(-1)
    reference = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values.flatten(1, 2).double()
    torch.testing.assert_close(out.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_rows_computed_alone_have_the_same_bits(head_dim: int) -> None:
    q, keys, values, limits = _case(4, 64, 6, head_dim)
    whole = attend(q, keys, values, limits)
    for first in range(0, 64, 8):
        part = attend(q[1:2, first : first + 8], keys[1:2], values[1:2], limits[1:2, first : first + 8])
        assert torch.equal(part[0], whole[1, first : first + 8])


@pytest.mark.parametrize("window", [1, 7, BLOCK_POSITIONS, 100, 10_000])
@pytest.mark.parametrize("num_blocks", [1, 3, 6])
def test_window_agrees_with_plain_attention(num_blocks: int, window: int) -> None:
    q, keys, values, limits = _case(2, 16, num_blocks, 16)
    out = attend(q, keys, values, limits, window)
    scores = q.double() @ keys.flatten(1, 2).double().transpose(1, 2)
    positions, ends = torch.arange(num_blocks * BLOCK_POSITIONS), limits.unsqueeze(-1)
    visible = (positions < ends) & (positions >= ends - window)
    reference = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values.flatten(1, 2).double()
    torch.testing.assert_close(out.double(), reference, rtol=1e-5, atol=1e-5)


def test_windowed_rows_have_the_same_bits_alone_and_before_more_blocks() -> None:
    q, keys, values, limits = _case(3, 64, 6, 16)
    window = BLOCK_POSITIONS + 3
    whole = attend(q, keys, values, limits, window)
    for first in range(0, 64, 8):
        rows = slice(first, first + 8)
        num_blocks = -(-int(limits[1:2, rows].max()) // BLOCK_POSITIONS)
        part = attend(
            q[1:2, rows], keys[1:2, :num_blocks], values[1:2, :num_blocks], limits[1:2, rows], window
        )
        assert torch.equal(part[0], whole[1, rows])


def test_what_lies_before_the_window_changes_no_bit() -> None:
    q, keys, values, _ = _case(1, 8, 4, 16)
    limits = torch.full((1, 8), 3 * BLOCK_POSITIONS + 9)
    window = BLOCK_POSITIONS
    before = attend(q, keys, values, limits, window)
    keys[:, :2], values[:, :2] = 3.0, -7.0
    assert torch.equal(attend(q, keys, values, limits, window), before)


def test_masked_blocks_behind_the_limit_change_no_bit() -> None:
    q, keys, values, _ = _case(2, 8, 9, 32)
    limits = torch.full((2, 8), 2 * BLOCK_POSITIONS + 5)
    assert torch.equal(
        attend(q, keys, values, limits),
        attend(q, keys[:, :3].contiguous(), values[:, :3].contiguous(), limits),
    )


def test_cutting_queries_into_pieces_changes_no_bit() -> None:
    num_blocks = 40
    num_rows = 2 * MAX_SCORE_ELEMENTS // (2 * num_blocks * BLOCK_POSITIONS) // 8 * 8
    q, keys, values, limits = _case(2, num_rows, num_blocks, 16)
    whole = attend(q, keys, values, limits)
    tail = attend(q[:, -8:], keys, values, limits[:, -8:])
    assert torch.equal(tail, whole[:, -8:])


def test_tree_sum_ignores_appended_zeros() -> None:
    parts = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    padded = torch.cat((parts, torch.zeros(2, 8, 3)), dim=1)
    assert torch.equal(tree_sum(parts), tree_sum(padded))
    torch.testing.assert_close(tree_sum(parts), parts.sum(1))
