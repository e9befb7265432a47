"""What the codec's decoder is made of: convolutions that look back, activations, and what each keeps of a stream.

Rows are times and columns channels, (T, C) in float32; products are in the dtype of their matrix. A row is computed
from itself and rows before it, by the row kernel or by operations on single elements, so that its bits do not depend on
how a stream is cut (docs/exactness.md). Made by `router.speech.codec_weights` for `router.speech.vocoder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from experts.numerics import RowKernel
from router.media.tower_parts import LayerNorm, gelu
from router.speech.codec_shape import TAPS
from router.speech.native_snake import snake_rows


@dataclass
class StreamState:
    """The last rows of one stream that layers will look back at, by the layer's name."""

    rows: dict[str, Tensor] = field(default_factory=dict)

    def extend(self, name: str, rows_TC: Tensor, most: int, *, is_padded: bool) -> Tensor:
        """What a layer kept, and these after it; the last `most` of both are kept from now on.

        is_padded: whether zeros come before the first row of a stream.
        """
        earlier = self.rows.get(name)
        if earlier is None:
            earlier = rows_TC.new_zeros(most if is_padded else 0, rows_TC.shape[1])
        seen = torch.cat((earlier, rows_TC))
        self.rows[name] = seen[-most:].clone()
        return seen


class Part(Protocol):
    """One step of the way from frames to samples."""

    def __call__(self, x_TC: Tensor, state: StreamState) -> Tensor:
        """The rows that these settle, and no others; float32."""
        ...


@dataclass(frozen=True)
class Matrix:
    weight_OI: Tensor
    bias_O: Tensor | None
    """float32; None where it is added later."""
    kernel: RowKernel

    def __call__(self, x_RI: Tensor) -> Tensor:
        """(R, O): float32, or the product as it is rounded where there is no bias."""
        product_RO = self.kernel.linear(self.rounded(x_RI), self.weight_OI)
        return product_RO if self.bias_O is None else product_RO.float().add_(self.bias_O)

    def rounded(self, x_RI: Tensor) -> Tensor:
        return x_RI.to(self.weight_OI.dtype)


@dataclass(frozen=True)
class Convolution:
    """Every row from itself and the `TAPS - 1` before it that are `dilation` apart; zeros come before the first."""

    name: str
    matrix: Matrix
    """Inputs are tap after tap, the earliest first, with all channels of each."""
    dilation: int = 1

    def __call__(self, x_TC: Tensor, state: StreamState) -> Tensor:
        back = (TAPS - 1) * self.dilation
        seen = state.extend(self.name, self.matrix.rounded(x_TC), back, is_padded=True)
        if self.dilation == 1:
            return self.matrix(neighbours(seen, TAPS))
        # Of every `dilation`-th row, those that a row looks at lie side by side.
        phases = [
            self.matrix(neighbours(seen[phase :: self.dilation].contiguous(), TAPS))
            for phase in range(min(self.dilation, x_TC.shape[0]))
        ]
        out_TO = phases[0].new_empty(x_TC.shape[0], phases[0].shape[1])
        for phase, rows in enumerate(phases):
            out_TO[phase :: self.dilation] = rows
        return out_TO


@dataclass(frozen=True)
class Upsampling:
    """`rate` rows of each; where they overlap with those of the next, a row settles the ones of the row before it."""

    name: str
    matrix: Matrix
    """Outputs are row after row, with all channels of each; inputs the row before where rows overlap, then the row."""
    rate: int
    overlaps: bool

    def __call__(self, x_TC: Tensor, state: StreamState) -> Tensor:
        x_TC = self.matrix.rounded(x_TC)
        if self.overlaps:
            x_TC = neighbours(state.extend(self.name, x_TC, 1, is_padded=False), 2)
        return self.matrix(x_TC).reshape(self.rate * len(x_TC), -1)


@dataclass(frozen=True)
class Snake:
    """y + sin(y * frequency)^2 * magnitude in float32, where y is what comes and a bias."""

    bias_C: Tensor
    frequency_C: Tensor
    magnitude_C: Tensor
    dtype: torch.dtype
    """To which what it gives is rounded: it is multiplied next."""
    kernel: RowKernel

    def __call__(self, x_TC: Tensor) -> Tensor:
        if self.kernel.product == "native":
            vectors = self.bias_C, self.frequency_C, self.magnitude_C
            return snake_rows(self.kernel.level, x_TC, *vectors, self.dtype)
        wide_TC = x_TC.float() + self.bias_C
        waves = (wide_TC * self.frequency_C).sin_()
        return waves.mul_(waves).mul_(self.magnitude_C).add_(wide_TC).to(self.dtype)


@dataclass(frozen=True)
class ResidualUnit:
    first: Snake
    wide: Convolution
    second: Snake
    """With the bias of what comes before it."""
    narrow: Matrix

    def __call__(self, x_TC: Tensor, state: StreamState) -> Tensor:
        return self.narrow(self.second(self.wide(self.first(x_TC), state))).add_(x_TC)


@dataclass(frozen=True)
class ConvNeXt:
    """Each channel with its own neighbours in time, then channels with each other, added to what came."""

    name: str
    taps_KC: Tensor
    bias_C: Tensor
    norm: LayerNorm
    inner: Matrix
    outer: Matrix
    gamma_C: Tensor

    def __call__(self, x_TC: Tensor, state: StreamState) -> Tensor:
        seen = state.extend(self.name, x_TC, TAPS - 1, is_padded=True)
        mixed_TC = self.bias_C.repeat(len(x_TC), 1)
        for tap, weight_C in enumerate(
            self.taps_KC
        ):  # products and sums apart, so that each is rounded in one way
            mixed_TC += seen[tap : tap + len(x_TC)] * weight_C
        return self.outer(gelu(self.inner(self.norm(mixed_TC)))).mul_(self.gamma_C).add_(x_TC)


@dataclass(frozen=True)
class Stage:
    """One step up in rate while there is sound."""

    snake: Snake
    upsampling: Upsampling
    units: tuple[ResidualUnit, ...]

    def __call__(self, x_TC: Tensor, state: StreamState) -> Tensor:
        x_TC = self.upsampling(self.snake(x_TC), state)
        for unit in self.units:
            x_TC = unit(x_TC, state)
        return x_TC


@dataclass(frozen=True)
class Ending:
    """From channels to samples."""

    snake: Snake
    convolution: Convolution

    def __call__(self, x_TC: Tensor, state: StreamState) -> Tensor:
        """(T, 1) within [-1, 1]."""
        return self.convolution(self.snake(x_TC), state)[:, :1].clamp_(-1.0, 1.0)


def neighbours(rows_TC: Tensor, count: int) -> Tensor:
    """Each row with the next ones, side by side: (T - count + 1, count * C), a view that copies nothing."""
    channels = rows_TC.shape[1]
    return rows_TC.as_strided((max(len(rows_TC) - count + 1, 0), count * channels), (channels, 1))
