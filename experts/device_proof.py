"""Proves on this device, at start, that an expert's rows have the same bits whatever comes with them.

Of the products of experts alone: an expert actor computes nothing else, and `router.device_self_test` adds what a
router needs. On a CPU `experts.numerics.calibrate` does.
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
from experts.numerics import LARGEST_ERRORS, RowKernel, calibrate, swiglu

logger = logging.getLogger(__name__)

NUM_ROWS = 512
PARTS = ((0, 1), (5, 2), (10, 7), (32, 1), (31, 33), (1, 64), (100, 412))
"""First row and number of rows."""
GROUPS = 16
"""Experts of the grouped matmul's proof; the most rows that it is given are these times NUM_ROWS."""


def prove_experts(width: int, expert_width: int, dtype: torch.dtype, device: torch.device) -> RowKernel:
    """The row kernel of a process that computes experts of these widths on any device, and nothing else.

    Raises NotRowInvariant naming the kernel that fails.
    """
    kernel = calibrate([(2 * expert_width, width), (width, expert_width)], dtype, device)
    if kernel.is_on_cpu:
        return kernel
    prove_activation(expert_width, dtype, device)
    return replace(kernel, is_grouped=is_grouping_sound(width, expert_width, kernel, dtype))


def prove_activation(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of gated products with so many outputs. Raises NotRowInvariant."""
    rows = random_rows(2, NUM_ROWS, 2 * width).mul_(4).to(device, dtype)
    if not keeps_rows(swiglu, rows):
        raise NotRowInvariant(f"activation of width {width}", str(dtype))


def is_grouping_sound(width: int, expert_width: int, kernel: RowKernel, dtype: torch.dtype) -> bool:
    """Whether grouped matmul is there, comes close to a plain product, and gives every expert's rows the same bits
    whatever other experts have rows, and how many. Raises torch.OutOfMemoryError."""
    records = random_rows(5, GROUPS, 3 * width * expert_width).mul_(width**-0.5).to(kernel.device, dtype)
    stack = view_stack(records.view(torch.uint8), dtype, width)
    x_PD = random_rows(6, NUM_ROWS, width).to(kernel.device, dtype)
    try:
        if not _are_groups_sound(x_PD, stack, kernel.row_multiple):
            return False
    except torch.OutOfMemoryError:
        raise  # a moment's, which must not decide between two classes
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        logger.info("experts are multiplied one by one: %s", str(error).split("\n")[0])
        return False
    one = ExpertWeights(stack.gate_up_EFD[0], stack.down_EDF[0])
    plain = compute_segments(x_PD, [(0, NUM_ROWS)], [one], kernel).float().cpu()
    found = compute_groups(x_PD, [NUM_ROWS], [0], stack).float().cpu()
    return bool((found - plain).abs().max() <= LARGEST_ERRORS[dtype] * plain.abs().max())


def keeps_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether some rows alone get what they get among all."""
    whole = function(rows)
    return all(
        torch.equal(function(rows[first : first + count].clone()), whole[first : first + count])
        for first, count in PARTS
    )


def random_rows(seed: int, *shape: int) -> Tensor:
    """On the host, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
