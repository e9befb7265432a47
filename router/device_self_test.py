"""Proves at start, on this device, what docs/exactness.md promises of its kernels; raises where it cannot.

As `router.self_test`, which calls it; with the shapes in which a device computes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from experts.device_proof import NUM_ROWS, keeps_rows, prove_activation, random_rows
from experts.errors import NotRowInvariant
from experts.numerics import LARGEST_ERRORS, Norm, RowKernel, calibrate
from router.attention import BLOCK_POSITIONS
from router.device_attention import QUERY_ROWS, attend_in_tiles
from router.device_norm import norm_on_device
from router.model_config import ModelConfig

NORMS: tuple[Norm, ...] = ("fused", "halves")
NUM_BLOCKS = 5


def prove_device(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, window: int | None
) -> RowKernel:
    """The row kernel for this model on this device, but for its experts: theirs is `prove_experts`', in every process.
    window: a short one, where the model has any.

    Raises NotRowInvariant naming the kernel that fails.
    """
    kernel = calibrate(config.linear_shapes(), dtype, device)
    for some in dict.fromkeys((None, window)):
        _prove_attention(config.head_dim, some, device)
    for width in dict.fromkeys(config.gated_widths()):
        prove_activation(width, dtype, device)
    return replace(kernel, norm=_choose_norm(config, dtype, device))


def _choose_norm(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Norm:
    """The first way that passes for all widths. Raises NotRowInvariant."""
    widths = dict.fromkeys((*config.norm_widths(), config.head_dim))
    for kind in NORMS:
        failure = next((width for width in widths if not _is_norm_sound(kind, width, dtype, device)), None)
        if failure is None:
            return kind
    raise NotRowInvariant(f"norm of width {failure}", str(dtype))


def _is_norm_sound(kind: Norm, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Close to a plain one, and every row by itself."""
    eps = 1e-6
    rows, weight = (
        random_rows(3, NUM_ROWS, width).to(device, dtype),
        torch.ones(width, dtype=dtype).to(device),
    )

    def norm(part: Tensor) -> Tensor:
        return norm_on_device(kind, part, weight, eps)

    wide = rows.cpu().double()
    plain = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    error = (norm(rows).cpu().double() - plain).abs().max()
    return bool(error <= LARGEST_ERRORS[dtype] * plain.abs().max()) and keeps_rows(norm, rows)


def _prove_attention(head_dim: int, window: int | None, device: torch.device) -> None:
    """The same tiles alone, among others, in more sets, and with more (masked) key blocks."""
    num_rows = 4 * QUERY_ROWS
    q = random_rows(1, 9, num_rows, head_dim).to(device)
    keys, values = (random_rows(seed, 9, NUM_BLOCKS, BLOCK_POSITIONS, head_dim).to(device) for seed in (2, 3))
    # The first tile sees one block only: a single product may take a path of its own in the library.
    limits = torch.arange(num_rows).expand(9, -1) + 1
    whole = attend_in_tiles(q, keys, values, limits.to(device), window)
    for num_sets, first, count in ((1, 0, 1), (9, 0, 1), (2, 1, 2), (1, 3, 1), (5, 0, 4)):
        rows = slice(first * QUERY_ROWS, (first + count) * QUERY_ROWS)
        needed = -(-int(limits[0, rows][-1]) // BLOCK_POSITIONS)
        part = attend_in_tiles(
            q[:num_sets, rows].contiguous(),
            keys[:num_sets, :needed].contiguous(),
            values[:num_sets, :needed].contiguous(),
            limits[:num_sets, rows].contiguous().to(device),
            window,
        )
        if not torch.equal(part, whole[:num_sets, rows]):
            raise NotRowInvariant(f"attention with heads of {head_dim}", "float32")
