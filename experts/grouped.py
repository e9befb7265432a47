"""Experts that lie side by side on a device, and the products of all of a call in one: PyTorch's grouped matmul.

A row's bits must not depend on which other experts are asked for, nor on whether they lie side by side;
`experts.device_proof` proves that of this device before the kernel is used (`RowKernel.grouping`). Called by
`experts.ffn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from experts.devices import upload
from experts.numerics import swiglu


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """Some experts of one width, by their places in one piece of memory."""

    gate_up_EFD: Tensor
    """(E, 2F, D)."""
    down_EDF: Tensor


def view_stack(records_EB: Tensor, dtype: torch.dtype, width: int) -> ExpertStack:
    """See E expert records (uint8, as `experts.ffn.view_expert` takes them) as matrices; copies nothing."""
    values = records_EB.view(dtype)
    expert_width = values.shape[1] // (3 * width)
    split = 2 * expert_width * width
    return ExpertStack(
        torch.unflatten(values[:, :split], 1, (2 * expert_width, width)),
        torch.unflatten(values[:, split:], 1, (width, expert_width)),
    )


def compute_groups(x_PD: Tensor, rows: Sequence[int], places: Sequence[int], stack: ExpertStack) -> Tensor:
    """Gated projections of consecutive rows, so many for each of the experts at these places, which ascend.

    (P, D) -> (P, D).
    """
    counts_E = torch.zeros(len(stack.gate_up_EFD), dtype=torch.int32)
    counts_E[list(places)] = torch.tensor(rows, dtype=torch.int32)
    ends_E = upload(counts_E.cumsum(0, dtype=torch.int32), x_PD.device)
    hidden_PF = swiglu(grouped_mm(x_PD, stack.gate_up_EFD.transpose(1, 2), offs=ends_E))
    return grouped_mm(hidden_PF, stack.down_EDF.transpose(1, 2), offs=ends_E)
