"""Rotary position embedding with three position rows (time, height, width), in float32 throughout.

Text uses equal rows, which makes it the plain one-dimensional form. Called by `router.backbone`.
Source of the frequencies: `transformers`, modeling_rope_utils, operation by operation.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from router.model_config import ModelConfig
from router.rope_config import RopeConfig

KEPT_STEP = 1024
MOST_KEPT = 1 << 15
"""Positions whose cosines and sines are kept once they were asked for, some at a time; of heads of 128 it is 34 MB."""


class RotaryEmbedding:
    """Inverse frequencies and, for each, the position row that drives it."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        self._config, self._head_dim, self._device = config.rope, config.head_dim, device
        self._inverse_frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
        rows = _rows(config.head_dim // 2, config.rope.mrope_section)
        self._row_of_frequency = torch.tensor(rows, device=device)
        empty = torch.empty(0, 1, config.head_dim, device=device)
        self._kept = empty, empty
        if not config.rope.depends_on_length:
            self._keep(1)

    def tables(self, positions_3T: Tensor, lengths_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, each (T, 1, head_dim) float32, for positions of shape (3, T).

        lengths_T: int64, for each row the length of text that its frequencies are for; only the dynamic kind asks.
        """
        if self._config.depends_on_length:
            return self._compute(positions_3T, lengths_T)
        if positions_3T.stride(0) == 0:  # one row three times: text
            cos, sin = self._kept
            try:
                return cos.index_select(0, positions_3T[0]), sin.index_select(0, positions_3T[0])
            except IndexError:
                pass
        return self._keep_and_look_up(positions_3T)

    def _keep_and_look_up(self, positions_3T: Tensor) -> tuple[Tensor, Tensor]:
        """What can be kept comes from there whatever stands beside it, so that all of it was computed in one way."""
        is_kept_T = (positions_3T == positions_3T[0]).all(0) & (positions_3T[0] < MOST_KEPT)
        rows, positions = is_kept_T.nonzero().flatten(), positions_3T[0][is_kept_T]
        if len(rows):
            self._keep(int(positions.max()) + 1)
        if len(rows) == len(is_kept_T):
            return self._kept[0].index_select(0, positions), self._kept[1].index_select(0, positions)
        computed = self._compute(positions_3T)
        for table, kept in zip(computed, self._kept, strict=True):
            table[rows] = kept.index_select(0, positions)
        return computed

    def _keep(self, num_positions: int) -> None:
        while len(self._kept[0]) < num_positions:
            first = len(self._kept[0])
            positions = torch.arange(first, first + KEPT_STEP, device=self._device)
            more = self._compute(positions.expand(3, -1))
            self._kept = torch.cat((self._kept[0], more[0])), torch.cat((self._kept[1], more[1]))

    def _compute(self, positions_3T: Tensor, lengths_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        frequencies = self._inverse_frequencies
        if self._config.depends_on_length:
            assert lengths_T is not None
            frequencies = torch.stack([self._for_length(length) for length in lengths_T.tolist()])
        angles = positions_3T[self._row_of_frequency].t().float() * frequencies
        angles = torch.cat((angles, angles), dim=1)
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        scaling = self._config.attention_scaling
        return (cos, sin) if scaling == 1.0 else (cos * scaling, sin * scaling)

    def _for_length(self, length: int) -> Tensor:
        if length <= self._config.original_context:
            return self._inverse_frequencies
        return _stretched(self._config, self._head_dim, length).to(self._device)


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2). x: float32 (T, heads, head_dim); any shape that cos and sin go with."""
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos + torch.cat((-second, first), dim=-1) * sin


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """(head_dim / 2,) float32, of the dynamic kind for texts within the original context."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return 1.0 / powers / rope.factor
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, powers)
    return _llama3(rope, 1.0 / powers) if rope.kind == "llama3" else 1.0 / powers


@functools.lru_cache(maxsize=4096)
def _stretched(rope: RopeConfig, head_dim: int, length: int) -> Tensor:
    """The dynamic kind's frequencies for a text of this length; computed alone, so that no batch changes a bit."""
    ratio = rope.factor * torch.tensor(length) / rope.original_context - (rope.factor - 1)
    base = rope.theta * ratio ** (head_dim / (head_dim - 2))
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _yarn(rope: RopeConfig, head_dim: int, powers: Tensor) -> Tensor:
    """High frequencies as trained, low ones stretched, a ramp between them. Source: arXiv 2309.00071."""

    def dimension(num_rotations: float) -> float:
        """The dimension that turns this often within the original context."""
        turns = math.log(rope.original_context / (num_rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    trained = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - trained) + 1.0 / powers * trained


def _llama3(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """As yarn, with bounds by wavelength. Source: Llama 3.1."""
    wavelengths = 2 * math.pi / inverse
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    stretched = torch.where(wavelengths > longest, inverse / rope.factor, inverse)
    smooth = (rope.original_context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * stretched / rope.factor + smooth * stretched
    is_between = ~(wavelengths < shortest) * ~(wavelengths > longest)
    return torch.where(is_between, between, stretched)


def _rows(num_frequencies: int, section: tuple[int, ...] | None) -> list[int]:
    """0, 1 or 2 for each frequency: interleaved as time, height, width while a section lasts, then time."""
    rows = [0] * num_frequencies
    for row in (1, 2):
        for index in range(row, min(3 * section[row], num_frequencies) if section else 0, 3):
            rows[index] = row
    return rows
