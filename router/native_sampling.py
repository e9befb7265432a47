"""Tokens by the C source in `experts/native`: those of many rows in one call, with any of the filters.

The same tokens as `router.sampling` draws in PyTorch, at every level: both count in whole numbers. Every pointer that
goes in is of a tensor checked here. Called by `router.sampling`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from experts.native_products import LEVELS, library_for
from router.native_attention import expect
from router.request import SamplingParams

MOST_SHARPNESS = 1e300
_DRAWING = struct.Struct("@Qq4d")
"""`drawing` of sampling.c."""


def sharpness_of(params: SamplingParams) -> float:
    """By which differences between logits are multiplied. Finite however small the temperature, so that 0 stays 0."""
    return min(1.0 / params.temperature, MOST_SHARPNESS)


def draw_rows(
    level: str, logits_SV: Tensor, params: Sequence[SamplingParams], uniforms_S: Sequence[float]
) -> list[int]:
    """One token of each row, drawn at a temperature above 0. logits_SV: float32 or float64.

    Raises ValueError where anything does not fit, MemoryError.
    """
    num_rows, vocab_size = logits_SV.shape
    if (
        logits_SV.dtype not in (torch.float32, torch.float64)
        or not len(params) == len(uniforms_S) == num_rows
    ):
        raise ValueError(
            f"no tokens of {logits_SV.dtype} {tuple(logits_SV.shape)} for {len(params)} requests"
        )
    expect(logits_SV, (num_rows, vocab_size), logits_SV.dtype)
    first, row_bytes = logits_SV.data_ptr(), vocab_size * logits_SV.itemsize
    rows = b"".join(
        [
            _DRAWING.pack(
                first + row * row_bytes, each.top_k, sharpness_of(each), each.top_p, each.min_p, uniform
            )
            for row, (each, uniform) in enumerate(zip(params, uniforms_S, strict=True))
        ]
    )
    tokens = array("q", bytes(8 * num_rows))
    found = library_for(level)
    code = found.draw(
        LEVELS.index(level),
        logits_SV.dtype == torch.float64,
        rows,
        num_rows,
        vocab_size,
        tokens.buffer_info()[0],
        found.run_in_threads,
        torch.get_num_threads(),
    )
    if code:
        raise MemoryError(f"no memory for the tokens of {num_rows} rows")
    return tokens.tolist()
