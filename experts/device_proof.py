"""Proves on this device, at start, that an expert's rows have the same bits whatever comes with them.

Of the products of experts alone: an expert actor computes nothing else, and `router.device_self_test` adds what a
router needs. On a CPU `experts.numerics.calibrate` does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from experts.errors import NotRowInvariant
from experts.ffn import ExpertWeights, compute_segments, view_expert
from experts.grouped import ExpertStack, compute_groups, view_stack
from experts.numerics import LARGEST_ERRORS, TESTED_ROWS, Grouping, RowKernel, calibrate, swiglu
from experts.triton_products import compute_gated, failures, why_not_there

logger = logging.getLogger(__name__)

NUM_ROWS = 512
PARTS = ((0, 1), (5, 2), (10, 7), (32, 1), (31, 33), (1, 64), (100, 412))
"""First row and number of rows."""
GROUPS = 16
"""Experts of the proof of products of many at once; the most rows that these are given are those times NUM_ROWS."""

Groups = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""(P, D) rows, of which so many each are for the experts at these places, ascending -> (P, D)."""


def prove_experts(width: int, expert_width: int, dtype: torch.dtype, device: torch.device) -> RowKernel:
    """The row kernel of a process that computes experts of these widths on any device, and nothing else.

    Raises NotRowInvariant naming the kernel that fails.
    """
    kernel = calibrate([(2 * expert_width, width), (width, expert_width)], dtype, device)
    if kernel.is_on_cpu:
        return kernel
    prove_activation(expert_width, dtype, device)
    return replace(kernel, grouping=next(sound_groupings(width, expert_width, kernel, dtype)))


def prove_activation(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of gated products with so many outputs. Raises NotRowInvariant."""
    rows = random_rows(2, NUM_ROWS, 2 * width).mul_(4).to(device, dtype)
    if not keeps_rows(swiglu, rows):
        raise NotRowInvariant(f"activation of width {width}", str(dtype))


def sound_groupings(
    width: int, expert_width: int, kernel: RowKernel, dtype: torch.dtype
) -> Iterator[Grouping]:
    """How experts of these widths can be multiplied, the best way first, each proven when it is asked for. Raises
    torch.OutOfMemoryError."""
    records = random_rows(5, GROUPS, 3 * width * expert_width).mul_(width**-0.5).to(kernel.device, dtype)
    reason = why_not_there(kernel.device, dtype)
    if reason is None:
        experts = [view_expert(record.view(torch.uint8), dtype, width) for record in records]
        if are_tiles_sound(experts, kernel, dtype):
            yield "triton"
    else:
        logger.info("experts are not multiplied by our own kernel: %s", reason)
    if _is_grouping_sound(records, width, kernel, dtype):
        yield "grouped"
    yield ""


def _is_grouping_sound(records: Tensor, width: int, kernel: RowKernel, dtype: torch.dtype) -> bool:
    """Whether grouped matmul is there, comes close to a plain product, and gives every expert's rows the same bits
    whatever other experts have rows, and how many. records: of GROUPS experts. Raises torch.OutOfMemoryError."""
    stack = view_stack(records.view(torch.uint8), dtype, width)
    experts = [ExpertWeights(*parts) for parts in zip(stack.gate_up_EFD, stack.down_EDF, strict=True)]

    def compute(x_PD: Tensor, rows: Sequence[int], places: Sequence[int]) -> Tensor:
        if len(places) == 1 and rows[0] == unit:  # as where it lies by itself
            alone = ExpertStack(stack.gate_up_EFD[places[0]][None], stack.down_EDF[places[0]][None])
            return compute_groups(x_PD, rows, [0], alone)
        return compute_groups(x_PD, rows, places, stack)

    unit = kernel.row_multiple
    num_units = NUM_ROWS // unit
    calls = [
        *(((1, GROUPS - 1), (n * unit, (num_units - n) * unit)) for n in range(1, num_units)),
        ((2,), (NUM_ROWS,)),
        (tuple(range(num_units)), (unit,) * num_units),
        (tuple(range(GROUPS)), (NUM_ROWS,) * GROUPS),
    ]
    return _is_sound("grouped matmul", compute, experts, calls, kernel, dtype)


def are_tiles_sound(experts: Sequence[ExpertWeights], kernel: RowKernel, dtype: torch.dtype) -> bool:
    """The same of our own kernel: with tiles of few rows and of many, whatever rows fill them. experts: GROUPS of one
    shape, on the device. Raises torch.OutOfMemoryError."""

    def compute(x_PD: Tensor, rows: Sequence[int], places: Sequence[int]) -> Tensor:
        tiled = [expert for place in places if (expert := experts[place].tiled) is not None]
        return compute_gated(x_PD, rows, range(len(x_PD)), tiled)

    every = tuple(range(GROUPS))
    calls = [
        *(((place,), (count,)) for place in (0, GROUPS - 1) for count in TESTED_ROWS),
        (every, tuple(1 + place for place in every)),  # tiles of few rows
        (every, (1,) * GROUPS),
        (every, tuple(TESTED_ROWS[place % len(TESTED_ROWS)] for place in every)),
        (every, (NUM_ROWS, *(1,) * (GROUPS - 2), NUM_ROWS - 1)),
        (every, (NUM_ROWS,) * GROUPS),
    ]
    return _is_sound("our own kernel", compute, experts, calls, kernel, dtype)


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


def _is_sound(
    name: str,
    compute: Groups,
    experts: Sequence[ExpertWeights],
    calls: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    kernel: RowKernel,
    dtype: torch.dtype,
) -> bool:
    """Of experts at the places of each call with so many rows, against each alone with the kernel's multiple."""
    width = experts[0].down_DF.shape[0]
    x_PD = random_rows(6, NUM_ROWS, width).to(kernel.device, dtype)
    try:
        parts = torch.split(x_PD, kernel.row_multiple)
        expected = [
            torch.cat([compute(rows_RD, [len(rows_RD)], [place]) for rows_RD in parts])
            for place in range(len(experts))
        ]
        if not all(_keeps_groups(compute, expected, x_PD, *call) for call in calls):
            return False
    except torch.OutOfMemoryError:
        raise  # a moment's, which must not decide between two classes
    except failures() as error:
        logger.info("experts are not multiplied by %s: %s", name, str(error).split("\n")[0])
        return False
    plain = compute_segments(x_PD, [(0, NUM_ROWS)], experts[:1], kernel).float().cpu()
    largest_error = (expected[0].float().cpu() - plain).abs().max()
    return bool(largest_error <= LARGEST_ERRORS[dtype] * plain.abs().max())


def _keeps_groups(
    compute: Groups, expected: Sequence[Tensor], x_PD: Tensor, places: Sequence[int], rows: Sequence[int]
) -> bool:
    """Rows of a call are those of x, over and over."""
    repeats = -(-sum(rows) // len(x_PD))
    found = compute(x_PD.repeat(repeats, 1)[: sum(rows)], rows, places)
    start = 0
    for place, count in zip(places, rows, strict=True):
        first = start % len(x_PD)
        wanted = torch.roll(expected[place], -first, 0)[:count]
        if not torch.equal(found[start : start + count], wanted):
            return False
        start += count
    return True
