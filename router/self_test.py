"""Proves at start, on this machine, what docs/exactness.md promises of single kernels; raises where it cannot.

The promise for whole steps is held by the test suite. Called by `router.loading`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from experts.devices import CPU
from experts.errors import NotRowInvariant
from experts.ffn import ExpertWeights, compute_segments
from experts.numerics import RowKernel, calibrate, one_thread, swiglu
from router.attention import BLOCK_POSITIONS, ROW_MULTIPLE, attend
from router.device_self_test import prove_device
from router.kv_cache import KvPool
from router.model_config import ModelConfig
from router.native_attention import NO_NORMS, Places, attend_in_cache, norm_rows
from router.step_batch import Span

PROVED_INPUTS = 64
"""Of gated products; their width is the model's."""
PROVED_WINDOW = BLOCK_POSITIONS - 3
"""Short enough that whole blocks lie before it."""


def prove_row_invariance(config: ModelConfig, dtype: torch.dtype, device: torch.device = CPU) -> RowKernel:
    """The row kernel for this model. Raises NotRowInvariant naming the kernel that fails."""
    if device.type != "cpu":
        return prove_device(config, dtype, device, PROVED_WINDOW if config.windowed_layers else None)
    kernel = calibrate(config.linear_shapes(), dtype)
    for window in (None, PROVED_WINDOW) if config.windowed_layers else (None,):
        if kernel.product == "native":
            _prove_native_attention(config, dtype, kernel.level, window)
        else:
            _prove_attention(config.head_dim, window)
    for width in dict.fromkeys(config.gated_widths()):
        if kernel.product == "native":
            _prove_gated(width, dtype, kernel)
        else:
            _prove_activation(width, dtype)
    for width in dict.fromkeys(config.norm_widths()):
        _prove_norm(width)
        if kernel.product == "native":
            _prove_native_norm(width, dtype, kernel.level)
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


def _prove_native_attention(config: ModelConfig, dtype: torch.dtype, level: str, window: int | None) -> None:
    """The same rows whole, by one thread, and in chunks beside another sequence that is elsewhere in the cache."""
    config = replace(
        config, num_layers=1, windowed_layers=frozenset({0} if window else ()), sliding_window=window
    )
    generator = torch.Generator().manual_seed(1)
    num_rows, num_blocks = 2 * BLOCK_POSITIONS + 9, 3
    qkv = torch.randn(num_rows, config.q_width + 2 * config.kv_width, generator=generator).to(dtype)
    angles = torch.randn(num_rows, 1, config.head_dim, generator=generator)
    pool = KvPool(config, 2 * num_blocks + 1, dtype)

    def rows_of(spans: Sequence[Span]) -> Tensor:
        """Of sequences whose rows and angles are those of their positions."""
        rows = [position for span in spans for position in range(span.first, span.first + span.count)]
        rotation = angles[rows].cos(), angles[rows].sin()
        return attend_in_cache(level, config, qkv[rows], NO_NORMS, rotation, pool, 0, Places.of(spans))

    with one_thread():
        whole = rows_of([Span((1, 2, 3), 0, num_rows)])
    first = 0
    for count in (1, 7, 60, 40, 1, 28):
        beside = [Span((6, 4, 5), first, count), Span((1, 2, 3), first, 1)]
        part = rows_of(beside)
        if not torch.equal(part[:count], whole[first : first + count]) or not torch.equal(
            part[count], whole[first]
        ):
            raise NotRowInvariant(f"attention with heads of {config.head_dim}", str(dtype))
        first += count


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


def _prove_native_norm(width: int, dtype: torch.dtype, level: str) -> None:
    rows = torch.randn(33, width, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight = torch.ones(width, dtype=dtype)
    whole = norm_rows(level, rows, weight, 1e-6)
    for first, count in ((0, 1), (5, 2), (10, 7), (32, 1)):
        if not torch.equal(
            norm_rows(level, rows[first : first + count], weight, 1e-6), whole[first : first + count]
        ):
            raise NotRowInvariant(f"norm of width {width}", str(dtype))


def _prove_norm(width: int) -> None:
    rows = torch.randn(33, width, generator=torch.Generator().manual_seed(3))
    whole = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)
    for first, count in ((0, 1), (5, 2), (10, 7), (32, 1)):
        part = rows[first : first + count].clone()
        if not torch.equal(
            torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + 1e-6), whole[first : first + count]
        ):
            raise NotRowInvariant(f"norm of width {width}", "float32")
