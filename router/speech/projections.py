"""From the text decoder's embeddings and hidden states to the talker's inputs: two linear layers with SiLU between.

Through the row kernel, so that a row's bits depend on nothing beside it. Called by `router.speech.speaker`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.numerics import RowKernel
from router.weights import TensorLoader

ROWS_AT_ONCE = 512


class Projection:
    """One of the talker's two, `text_projection` or `hidden_projection`."""

    def __init__(
        self, load: TensorLoader, name: str, widths: tuple[int, int, int], kernel: RowKernel
    ) -> None:
        """widths: of the text decoder, between the two layers, of the talker."""
        inputs, inner, outputs = widths
        self._kernel = kernel
        self._first_ID = load(f"{name}.linear_fc1.weight", inner, inputs)
        self._first_bias_I = load(f"{name}.linear_fc1.bias", inner)
        self._second_OI = load(f"{name}.linear_fc2.weight", outputs, inner)
        self._second_bias_O = load(f"{name}.linear_fc2.bias", outputs)

    @property
    def nbytes(self) -> int:
        parts = (self._first_ID, self._first_bias_I, self._second_OI, self._second_bias_O)
        return sum(part.nbytes for part in parts)

    def __call__(self, rows_RD: Tensor) -> Tensor:
        """(R, text decoder's width) -> (R, talker's), in their dtype; R at least 1."""
        return torch.cat([self._project(part) for part in torch.split(rows_RD, ROWS_AT_ONCE)])

    def _project(self, rows_RD: Tensor) -> Tensor:
        inner_RI = self._kernel.linear(rows_RD, self._first_ID) + self._first_bias_I
        wide_RI = inner_RI.float()
        # Written with exp for the reason that swiglu is.
        inner_RI = (wide_RI / torch.exp(-wide_RI).add_(1.0)).to(inner_RI.dtype)
        return self._kernel.linear(inner_RI, self._second_OI) + self._second_bias_O
