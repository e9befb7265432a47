"""The expert that every token of a layer passes, computed in the router's process. Called by `router.moe_block`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.ffn import ExpertWeights, compute_segments
from experts.numerics import RowKernel
from router.model_config import SHARED_GATE_ROWS


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

    def forward(self, hidden_PD: Tensor, num_tokens: int) -> Tensor:
        """sigmoid(gate(x)) * expert(x) of the first `num_tokens` rows, (num_tokens, D) float32.

        P must be a multiple of the row kernel's.
        """
        out_PD = compute_segments(hidden_PD, [(0, hidden_PD.shape[0])], [self.weights], self.kernel)
        gate_T1 = self.kernel.linear(hidden_PD, self.gate_GD)[:num_tokens, :1].float()
        # Written with exp for the reason that swiglu is.
        return out_PD[:num_tokens].float() / torch.exp(-gate_T1).add_(1.0)


def padded_gate(gate_1D: Tensor) -> Tensor:
    """The gate's only row, with zero rows below it: (1, D) -> (SHARED_GATE_ROWS, D)."""
    rows_GD = gate_1D.new_zeros(SHARED_GATE_ROWS, gate_1D.shape[1])
    rows_GD[:1] = gate_1D
    return rows_GD
