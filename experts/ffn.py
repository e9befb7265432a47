"""The expert's arithmetic: gated projections of the rows that a call brings, for one or many experts.

Pure functions over tensors. Our own products take a whole call at once (`experts.native_products`, on a device
`experts.triton_products`). With a library's, rows of one expert are computed together and padded to the row kernel's
multiple, so that a row's bits do not depend on how many rows came with it. Called by `experts.worker`, and by
`router.backbone` for dense layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.devices import upload
from experts.grouped import ExpertStack, compute_groups
from experts.native_products import GatedMatrices, compute_gated, float_matrix, gated_matrices
from experts.numerics import RowKernel, swiglu
from experts.packed_matrix import PackedMatrix, Weight, multiply
from experts.triton_products import TiledExpert
from experts.triton_products import compute_gated as compute_tiled
from experts.triton_products import float_matrix as tiled_matrix


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's projections as they lie in memory; gate and up are one matrix."""

    gate_up_FD: Weight
    """(2F, D): the gate's rows, then the up projection's."""
    down_DF: Weight
    stack: ExpertStack | None = field(default=None, kw_only=True)
    """In which it lies, on a device that has all experts of the layer."""
    place: int = field(default=0, kw_only=True)

    @property
    def nbytes(self) -> int:
        return self.gate_up_FD.nbytes + self.down_DF.nbytes

    def as_tensors(self) -> tuple[Tensor, Tensor]:
        """Both matrices of an expert that is not quantised. Raises TypeError."""
        if isinstance(self.gate_up_FD, PackedMatrix) or isinstance(self.down_DF, PackedMatrix):
            raise TypeError("a quantised expert has packed matrices")
        return self.gate_up_FD, self.down_DF

    @cached_property
    def native(self) -> GatedMatrices | None:
        """For our own products; None where the matrices are packed for another. Raises ValueError."""
        matrices = [
            matrix.native if isinstance(matrix, PackedMatrix) else float_matrix(matrix)
            for matrix in (self.gate_up_FD, self.down_DF)
        ]
        gate_up, down = matrices
        return None if gate_up is None or down is None else gated_matrices(gate_up, down)

    @cached_property
    def tiled(self) -> TiledExpert | None:
        """For our kernel of a device; None where the matrices are packed for another. Raises ValueError."""
        matrices = [
            matrix.tiled if isinstance(matrix, PackedMatrix) else tiled_matrix(matrix)
            for matrix in (self.gate_up_FD, self.down_DF)
        ]
        gate_up, down = matrices
        return None if gate_up is None or down is None else TiledExpert(gate_up, down)


def view_expert(record: Tensor, dtype: torch.dtype, width: int) -> ExpertWeights:
    """See an expert record (uint8, gate | up | down, each [out, in] row-major) as matrices; copies nothing.

    width: model width D. Raises ValueError when the record's size is no multiple of three D-wide matrices.
    """
    values = record.view(dtype)
    expert_width, rest = divmod(values.numel(), 3 * width)
    if rest or not expert_width:
        raise ValueError(
            f"a record of {record.numel()} bytes does not hold three {dtype} matrices {width} wide"
        )
    split = 2 * expert_width * width
    return ExpertWeights(
        values[:split].view(2 * expert_width, width), values[split:].view(width, expert_width)
    )


def compute_experts(call: ExpertCall, weights: Sequence[ExpertWeights], kernel: RowKernel) -> Tensor:
    """Apply each expert of the call to its rows. Returns (R, D) in the tokens' dtype, rows as in the call.

    weights: one per entry of `call.experts`, in that order.
    """
    if (experts := _native(weights, kernel)) is not None:
        return compute_gated(kernel.level, call.tokens_TD, experts, call.counts, call.token_of_R)
    if (tiled := _tiled(weights, kernel)) is not None:
        return compute_tiled(call.tokens_TD, call.counts, call.token_of_R, tiled)
    segments = _segments(call.counts, kernel)
    source: list[int] = []
    wanted: list[int] = []
    first = 0
    for (start, end), count in zip(segments, call.counts, strict=True):
        rows = call.token_of_R[first : first + count]
        source.extend(rows)
        source.extend(rows[-1:] * (end - start - count))
        wanted.extend(range(start, start + count))
        first += count
    device = call.tokens_TD.device
    x_PD = call.tokens_TD.index_select(0, upload(torch.tensor(source), device))
    if kernel.grouping == "grouped" and isinstance(weights[0].down_DF, Tensor):
        y_PD = _compute_grouped(x_PD, segments, weights)
    else:
        y_PD = compute_segments(x_PD, segments, weights, kernel)
    if len(wanted) == len(source):
        return y_PD
    return y_PD.index_select(0, upload(torch.tensor(wanted), device))


def _compute_grouped(
    x_PD: Tensor, segments: Sequence[tuple[int, int]], weights: Sequence[ExpertWeights]
) -> Tensor:
    """All at once where they lie side by side, else each in a group of its own: the same kernel, the same bits."""
    stack = weights[0].stack
    if stack is not None and all(expert.stack is stack for expert in weights):
        rows = [end - start for start, end in segments]
        return compute_groups(x_PD, rows, [expert.place for expert in weights], stack)
    parts = []
    for (start, end), expert in zip(segments, weights, strict=True):
        gate_up_FD, down_DF = expert.as_tensors()
        alone = ExpertStack(gate_up_FD.unsqueeze(0), down_DF.unsqueeze(0))
        parts.append(compute_groups(x_PD[start:end], [end - start], [0], alone))
    return torch.cat(parts)


def compute_segments(
    x_PD: Tensor, segments: Sequence[tuple[int, int]], weights: Sequence[ExpertWeights], kernel: RowKernel
) -> Tensor:
    """Gated projections of consecutive row ranges, each with its own weights. (P, D) -> (P, D).

    The segments' lengths must already be multiples of the row kernel's.
    """
    if (experts := _native(weights, kernel)) is not None:
        return compute_gated(kernel.level, x_PD, experts, [end - start for start, end in segments])
    two_f = weights[0].gate_up_FD.shape[0]
    gate_up_PF = x_PD.new_empty(x_PD.shape[0], two_f)
    for (start, end), expert in zip(segments, weights, strict=True):
        multiply(kernel, x_PD[start:end], expert.gate_up_FD, gate_up_PF[start:end])
    hidden_PF = swiglu(gate_up_PF)
    y_PD = torch.empty_like(x_PD)
    for (start, end), expert in zip(segments, weights, strict=True):
        multiply(kernel, hidden_PF[start:end], expert.down_DF, y_PD[start:end])
    return y_PD


def _native(weights: Sequence[ExpertWeights], kernel: RowKernel) -> list[GatedMatrices] | None:
    """The experts for our own products; None where these are not what they are multiplied by."""
    if kernel.product != "native" or weights[0].native is None:
        return None
    return [native for expert in weights if (native := expert.native) is not None]


def _tiled(weights: Sequence[ExpertWeights], kernel: RowKernel) -> list[TiledExpert] | None:
    """The same for our kernel of a device."""
    if kernel.grouping != "triton" or weights[0].tiled is None:
        return None
    return [tiled for expert in weights if (tiled := expert.tiled) is not None]


def _segments(counts: Sequence[int], kernel: RowKernel) -> list[tuple[int, int]]:
    segments = []
    start = 0
    for count in counts:
        end = start + kernel.padded(count)
        segments.append((start, end))
        start = end
    return segments
