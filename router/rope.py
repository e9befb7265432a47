"""Rotary position embedding with three position rows (time, height, width), in float32 throughout.

Text uses equal rows, which makes it the plain one-dimensional form. Called by `router.backbone`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from router.model_config import ModelConfig


class RotaryEmbedding:
    """Inverse frequencies and, for each, the position row that drives it."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        half = config.head_dim // 2
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self._inverse_frequencies = (1.0 / config.rope_theta**exponents).to(device)
        self._row_of_frequency = torch.tensor(_rows(half, config.mrope_section), device=device)

    def tables(self, positions_3T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (T, 1, head_dim) float32, for positions of shape (3, T)."""
        angles = positions_3T[self._row_of_frequency].t().float() * self._inverse_frequencies
        angles = torch.cat((angles, angles), dim=1)
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2). x: float32 (T, heads, head_dim)."""
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos + torch.cat((-second, first), dim=-1) * sin


def _rows(num_frequencies: int, section: tuple[int, ...] | None) -> list[int]:
    """0, 1 or 2 for each frequency: interleaved as time, height, width while a section lasts, then time."""
    rows = [0] * num_frequencies
    for row in (1, 2):
        for index in range(row, min(3 * section[row], num_frequencies) if section else 0, 3):
            rows[index] = row
    return rows
