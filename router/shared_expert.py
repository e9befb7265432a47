"""The expert that every token of a layer passes, computed in the router's process. Called by `router.moe_block`; where
nobody looks at a layer, `experts/native/shared_expert.c` computes the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.ffn import ExpertWeights, compute_segments
from experts.native_products import LEVELS, library_for
from experts.numerics import RowKernel
from router.model_config import SHARED_GATE_ROWS
from router.native_attention import expect


@dataclass(frozen=True)
class SharedExpert:
    """Weights of the expert and of the gate that scales its output."""

    weights: ExpertWeights
    gate_GD: Tensor
    """The gate in row 0, zeros below; see `padded_gate`."""
    kernel: RowKernel

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + self.gate_GD.nbytes

    def add_to(self, sums_TD: Tensor, hidden_PD: Tensor) -> Tensor:
        """sums + sigmoid(gate(x)) * expert(x) of the first T rows: (T, D) and (P, D) -> (T, D) float32; sums may be
        changed.

        P must be a multiple of the row kernel's. Raises ValueError where shapes do not fit.
        """
        num_tokens = sums_TD.shape[0]
        out_PD = compute_segments(hidden_PD, [(0, hidden_PD.shape[0])], [self.weights], self.kernel)
        gates_PG = self.kernel.linear(hidden_PD, self.gate_GD)
        if self.kernel.product == "native":
            return _add_gated(self.kernel.level, out_PD[:num_tokens], gates_PG[:num_tokens], sums_TD)
        # Written with exp for the reason that swiglu is.
        return sums_TD + out_PD[:num_tokens].float() / torch.exp(-gates_PG[:num_tokens, :1].float()).add_(1.0)


def _add_gated(level: str, out_TD: Tensor, gates_TG: Tensor, sums_TD: Tensor) -> Tensor:
    """In place, by our own sigmoid. The gate is in the first column."""
    (num_rows, width), dtype = out_TD.shape, out_TD.dtype
    expect(out_TD, (num_rows, width), dtype)
    expect(gates_TG, (num_rows, SHARED_GATE_ROWS), dtype)
    expect(sums_TD, (num_rows, width), torch.float32)
    library_for(level).add_gated(
        *(LEVELS.index(level), dtype == torch.bfloat16, out_TD.data_ptr(), gates_TG.data_ptr()),
        *(gates_TG.stride(0) * dtype.itemsize, num_rows, width, sums_TD.data_ptr()),
    )
    return sums_TD


def padded_gate(gate_1D: Tensor) -> Tensor:
    """The gate's only row, with zero rows below it: (1, D) -> (SHARED_GATE_ROWS, D)."""
    rows_GD = gate_1D.new_zeros(SHARED_GATE_ROWS, gate_1D.shape[1])
    rows_GD[:1] = gate_1D
    return rows_GD
