"""The activation of the codec's decoder by the C source in `experts/native`, in one pass over its rows.

Element by element, so that no element's bits depend on its place. Every pointer that goes in is of a tensor checked
here. Called by `router.speech.codec_parts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.native_products import DTYPES, LEVELS, library_for
from router.native_attention import expect


def snake_rows(
    level: str, x_TC: Tensor, bias_C: Tensor, frequency_C: Tensor, magnitude_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """y + sin(y * frequency)^2 * magnitude, where y is x + bias: (T, C) of the given dtype, computed in float32.

    Raises ValueError where shapes or dtypes do not fit, MemoryError.
    """
    num_rows, width = x_TC.shape
    x_TC = x_TC.contiguous()
    expect(x_TC, (num_rows, width), x_TC.dtype)
    for vector in (bias_C, frequency_C, magnitude_C):
        expect(vector, (width,), torch.float32)
    if x_TC.dtype not in DTYPES or dtype not in DTYPES:
        raise ValueError(f"no waves of {x_TC.dtype} as {dtype}")
    out_TC = x_TC.new_empty(num_rows, width, dtype=dtype)
    found = library_for(level)
    code = found.snake(
        LEVELS.index(level),
        x_TC.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        x_TC.data_ptr(),
        num_rows,
        width,
        bias_C.data_ptr(),
        frequency_C.data_ptr(),
        magnitude_C.data_ptr(),
        out_TC.data_ptr(),
        found.run_in_threads,
        torch.get_num_threads(),
    )
    if code:
        raise MemoryError(f"no memory for waves of {num_rows} rows")
    return out_TC
