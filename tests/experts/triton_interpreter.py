"""Triton's interpreter, which computes kernels on the CPU, made right for bfloat16. TRITON_INTERPRET must be set.

It keeps bfloat16 numbers as their bits, and forgets that in two places: products take these for whole numbers, and
whole numbers become bits of the same value. Of float32 it cuts off what a device rounds. Products are summed input
after input here, since a host library's order would depend on the tile, which a device's instruction does not know.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

assert knobs.runtime.interpret


def _wide(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _create_dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, sums: TensorHandle, *_: object
) -> TensorHandle:
    total = sums.data.copy()
    for column, row in zip(_wide(a).T, _wide(b), strict=True):
        total += column[:, None] * row
    return TensorHandle(total, sums.dtype.scalar)


def _to_float(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """Whole numbers, or float32 that is to have fewer bits."""
    if target.scalar != tl.bfloat16:
        return self.cast_impl(source, target)
    bits = source.data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, of two to the even one
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


InterpreterBuilder.create_dot = _create_dot
InterpreterBuilder.create_si_to_fp = InterpreterBuilder.create_fp_trunc = _to_float
