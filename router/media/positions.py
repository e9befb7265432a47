"""Rotary positions of a prompt with images in it. Pure.

Source: `transformers`, Qwen3OmniMoe's get_rope_index, of which text, sound and still images need this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Where an image's tokens stand, row by row."""

    first: int
    rows: int
    columns: int


def image_positions(num_prompt: int, grids: Sequence[Grid]) -> Tensor:
    """(3, num_prompt) int64: time, height, width. Text and sound advance all three alike; an image stays where it is in
    time and spans its grid in the other two. What follows goes on behind the largest."""
    parts, done, position = [], 0, 0
    for grid in grids:
        parts.append(torch.arange(position, position + grid.first - done).expand(3, -1))
        position += grid.first - done
        rows, columns = torch.arange(grid.rows), torch.arange(grid.columns)
        place = torch.stack(
            (
                torch.zeros(grid.rows * grid.columns, dtype=torch.int64),
                rows.repeat_interleave(grid.columns),
                columns.repeat(grid.rows),
            )
        )
        parts.append(place + position)
        done = grid.first + grid.rows * grid.columns
        position += max(grid.rows, grid.columns)
    parts.append(torch.arange(position, position + num_prompt - done).expand(3, -1))
    return torch.cat(parts, dim=1)
