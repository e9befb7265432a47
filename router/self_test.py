"""Proves at start, on this machine, what docs/exactness.md promises of single kernels; raises where it cannot.

The promise for whole steps is held by the test suite. Called by `router.loading`.
"""

from __future__ import annotations

import torch

from experts.errors import NotRowInvariant
from experts.ffn import ExpertWeights, compute_segments
from experts.numerics import RowKernel, calibrate, one_thread, swiglu
from router.attention import BLOCK_POSITIONS, ROW_MULTIPLE, attend
from router.model_config import ModelConfig

PROVED_INPUTS = 64
"""Of gated products; their width is the model's."""
PROVED_WINDOW = BLOCK_POSITIONS - 3
"""Short enough that whole blocks lie before it."""


def prove_row_invariance(config: ModelConfig, dtype: torch.dtype) -> RowKernel:
    """The row kernel for this model. Raises NotRowInvariant naming the kernel that fails."""
    kernel = calibrate(config.linear_shapes(), dtype)
    _prove_attention(config.head_dim, None)
    if config.windowed_layers:
        _prove_attention(config.head_dim, PROVED_WINDOW)
    for width in dict.fromkeys(config.gated_widths()):
        if kernel.product == "native":
            _prove_gated(width, dtype, kernel)
        else:
            _prove_activation(width, dtype)
    for width in dict.fromkeys(config.norm_widths()):
        _prove_norm(width)
    return kernel


def _prove_attention(head_dim: int, window: int | None) -> None:
    """The same rows alone, among others, with more (masked) key blocks, by one thread and by all."""
    generator = torch.Generator().manual_seed(1)
    num_rows, num_blocks = 8 * ROW_MULTIPLE, 5
    q = torch.randn(2, num_rows, head_dim, generator=generator)
    keys = torch.randn(2, num_blocks, BLOCK_POSITIONS, head_dim, generator=generator)
    values = torch.randn(2, num_blocks, BLOCK_POSITIONS, head_dim, generator=generator)
    # The first rows see one block only: a single small product may take a path of its own in the library.
    limits = (torch.arange(num_rows) * 2 + BLOCK_POSITIONS - 15).expand(2, -1)
    with one_thread():
        whole = attend(q, keys, values, limits, window)
    for num_sets, first, count in ((1, 0, 8), (2, 0, 64), (2, 8, 8), (1, 16, 24), (2, 40, 24)):
        rows = slice(first, first + count)
        needed = -(-int(limits[0, first + count - 1]) // BLOCK_POSITIONS)
        part = attend(
            q[:num_sets, rows],
            keys[:num_sets, :needed],
            values[:num_sets, :needed],
            limits[:num_sets, rows],
            window,
        )
        if not torch.equal(part, whole[:num_sets, rows]):
            raise NotRowInvariant(f"attention with heads of {head_dim}", "float32")


def _prove_activation(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(33, 2 * width, generator=torch.Generator().manual_seed(2)).mul_(4).to(dtype)
    whole = swiglu(rows)
    for first, count in ((0, 1), (5, 2), (10, 7), (32, 1)):
        if not torch.equal(swiglu(rows[first : first + count].clone()), whole[first : first + count]):
            raise NotRowInvariant(f"activation of width {width}", str(dtype))


def _prove_gated(width: int, dtype: torch.dtype, kernel: RowKernel) -> None:
    """Both products and what lies between them, which our own products compute in one call."""
    generator = torch.Generator().manual_seed(2)
    gate_up, down = (
        torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(dtype)
        for shape in ((2 * width, PROVED_INPUTS), (PROVED_INPUTS, width))
    )
    weights = [ExpertWeights(gate_up, down)]
    rows = torch.randn(33, PROVED_INPUTS, generator=generator).mul_(4).to(dtype)
    with one_thread():
        whole = compute_segments(rows, [(0, len(rows))], weights, kernel)
    for first, count in ((0, 1), (5, 2), (10, 7), (26, 7), (32, 1), (0, 33)):
        part = compute_segments(rows[first : first + count], [(0, count)], weights, kernel)
        if not torch.equal(part, whole[first : first + count]):
            raise NotRowInvariant(f"gated products of width {width}", str(dtype))


def _prove_norm(width: int) -> None:
    rows = torch.randn(33, width, generator=torch.Generator().manual_seed(3))
    whole = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)
    for first, count in ((0, 1), (5, 2), (10, 7), (32, 1)):
        part = rows[first : first + count].clone()
        if not torch.equal(
            torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + 1e-6), whole[first : first + count]
        ):
            raise NotRowInvariant(f"norm of width {width}", "float32")
