"""Proves at start, on this device, what docs/exactness.md promises of its kernels; raises where it cannot.

As `router.self_test`, which calls it; with the shapes in which a device computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from experts.errors import NotRowInvariant
from experts.ffn import ExpertWeights, compute_segments
from experts.grouped import ExpertStack, compute_groups, view_stack
from experts.numerics import LARGEST_ERRORS, Norm, RowKernel, calibrate, swiglu
from router.attention import BLOCK_POSITIONS
from router.device_attention import QUERY_ROWS, attend_in_tiles
from router.device_norm import norm_on_device
from router.model_config import ModelConfig

logger = logging.getLogger(__name__)

NORMS: tuple[Norm, ...] = ("fused", "halves")
NUM_ROWS = 512
PARTS = ((0, 1), (5, 2), (10, 7), (32, 1), (31, 33), (1, 64), (100, 412))
"""First row and number of rows."""
NUM_BLOCKS = 5
GROUPS = 16
"""Experts of the grouped matmul's proof; the most rows that it is given are these times NUM_ROWS."""


def prove_device(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, window: int | None
) -> RowKernel:
    """The row kernel for this model on this device. window: a short one, where the model has any.

    Raises NotRowInvariant naming the kernel that fails.
    """
    kernel = calibrate(config.linear_shapes(), dtype, device)
    for some in dict.fromkeys((None, window)):
        _prove_attention(config.head_dim, some, device)
    for width in dict.fromkeys(config.gated_widths()):
        rows = _random(2, NUM_ROWS, 2 * width).mul_(4).to(device, dtype)
        if not _keeps_rows(swiglu, rows):
            raise NotRowInvariant(f"activation of width {width}", str(dtype))
    return replace(
        kernel,
        norm=_choose_norm(config, dtype, device),
        is_grouped=bool(config.moe_layers) and is_grouping_sound(config, kernel, dtype),
    )


def is_grouping_sound(config: ModelConfig, kernel: RowKernel, dtype: torch.dtype) -> bool:
    """Whether grouped matmul is there, comes close to a plain product, and gives every expert's rows the same bits
    whatever other experts have rows, and how many."""
    width, inner = config.hidden_size, config.expert_width
    records = _random(5, GROUPS, 3 * width * inner).mul_(width**-0.5).to(kernel.device, dtype)
    stack = view_stack(records.view(torch.uint8), dtype, width)
    x_PD = _random(6, NUM_ROWS, width).to(kernel.device, dtype)
    try:
        if not _are_groups_sound(x_PD, stack, kernel.row_multiple):
            return False
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        logger.info("experts are multiplied one by one: %s", str(error).split("\n")[0])
        return False
    one = ExpertWeights(stack.gate_up_EFD[0], stack.down_EDF[0])
    plain = compute_segments(x_PD, [(0, NUM_ROWS)], [one], kernel).float().cpu()
    found = compute_groups(x_PD, [NUM_ROWS], [0], stack).float().cpu()
    return bool((found - plain).abs().max() <= LARGEST_ERRORS[dtype] * plain.abs().max())


def _are_groups_sound(x_PD: Tensor, stack: ExpertStack, unit: int) -> bool:
    """Of experts with any multiple of `unit` rows, in calls of few and of many, against each alone with `unit`."""
    num_units = len(x_PD) // unit
    expected = []
    for place in range(GROUPS):
        alone = ExpertStack(stack.gate_up_EFD[place][None], stack.down_EDF[place][None])
        parts = [compute_groups(rows_RD, [unit], [0], alone) for rows_RD in torch.split(x_PD, unit)]
        expected.append(torch.cat(parts))
    calls: list[tuple[tuple[int, ...], tuple[int, ...]]]
    calls = [((1, GROUPS - 1), (n * unit, (num_units - n) * unit)) for n in range(1, num_units)]
    calls += [((2,), (len(x_PD),)), (tuple(range(num_units)), (unit,) * num_units)]
    calls += [(tuple(range(GROUPS)), (len(x_PD),) * GROUPS)]
    for places, rows in calls:
        repeats = sum(rows) // len(x_PD)
        found = compute_groups(x_PD.repeat(repeats, 1), rows, places, stack)
        start = 0
        for place, count in zip(places, rows, strict=True):
            first = start % len(x_PD)
            if not torch.equal(found[start : start + count], expected[place][first : first + count]):
                return False
            start += count
    return True


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
    rows, weight = _random(3, NUM_ROWS, width).to(device, dtype), torch.ones(width, dtype=dtype).to(device)

    def norm(part: Tensor) -> Tensor:
        return norm_on_device(kind, part, weight, eps)

    wide = rows.cpu().double()
    plain = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    error = (norm(rows).cpu().double() - plain).abs().max()
    return bool(error <= LARGEST_ERRORS[dtype] * plain.abs().max()) and _keeps_rows(norm, rows)


def _keeps_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether some rows alone get what they get among all."""
    whole = function(rows)
    return all(
        torch.equal(function(rows[first : first + count].clone()), whole[first : first + count])
        for first, count in PARTS
    )


def _prove_attention(head_dim: int, window: int | None, device: torch.device) -> None:
    """The same tiles alone, among others, in more sets, and with more (masked) key blocks."""
    num_rows = 4 * QUERY_ROWS
    q = _random(1, 9, num_rows, head_dim).to(device)
    keys, values = (_random(seed, 9, NUM_BLOCKS, BLOCK_POSITIONS, head_dim).to(device) for seed in (2, 3))
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


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
