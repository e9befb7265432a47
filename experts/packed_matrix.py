"""A quantised matrix as the kernel of this machine wants it, and the product with it.

`native` takes codes and scales as they lie in the store (`experts.native_products`), `triton` the same on a device
(`experts.triton_products`). `pack` is PyTorch's kernels for
8-bit and 4-bit weights; `dequantise` is the plain way, slow for few rows, by which the others are checked and which
stands in where they fail. What `pack` makes belongs to one instruction set and one version of PyTorch: it is made at
load and never leaves the process. A matrix must not be taken on trust: `experts.quantised` proves a product before it
is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from experts.huge_pages import joined
from experts.native_products import NativeMatrix, coded_matrix
from experts.native_products import multiply as multiply_natively
from experts.numerics import RowKernel
from experts.triton_products import TiledMatrix
from experts.triton_products import coded_matrix as tiled_matrix
from experts.triton_products import multiply as multiply_tiled
from extraction.quantise import INT4_LIMIT, Quantization

PackedProduct = Literal["native", "triton", "pack", "dequantise"]

INT8_MULTIPLES = (4, 16)
"""Outputs and inputs; the kernel for 8-bit weights reads beyond the end of others."""
INT4_OUTPUTS = 16
ROWS_PACKED_AT_ONCE = 256
"""Packing takes 32-bit codes: eight times the memory, so some rows at a time. A multiple of every kernel's blocks."""
ROWS_DEQUANTISED_AT_ONCE = 1024
"""A head has 150,000 rows, which would take more than a gigabyte as float32."""
INNER_K_TILES = 2
"""An argument that the CPU's packing takes and does not use."""


@dataclass(frozen=True)
class CanonicalMatrix:
    """Codes and scales as a store has them (docs/store-format.md)."""

    codes: Tensor
    """uint8, (outputs, bytes of a row)."""
    scales: Tensor
    """bfloat16, (outputs,) or (outputs, groups)."""
    inputs: int
    quantization: Quantization

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.inputs

    def rows(self, first: int, end: int) -> CanonicalMatrix:
        """Some of its outputs; copies nothing."""
        return CanonicalMatrix(self.codes[first:end], self.scales[first:end], self.inputs, self.quantization)

    def on(self, device: torch.device) -> CanonicalMatrix:
        codes, scales = self.codes.to(device), self.scales.to(device)
        return CanonicalMatrix(codes, scales, self.inputs, self.quantization)

    def codes_as_int8(self) -> Tensor:
        """(outputs, inputs), from -128 to 127 or from -8 to 7."""
        if self.quantization.scheme == "int8":
            return self.codes.view(torch.int8)
        nibbles = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).view(self.codes.shape[0], -1)
        return nibbles[:, : self.inputs].to(torch.int8) - INT4_LIMIT

    def dequantised(self) -> Tensor:
        """(outputs, inputs) float32: every code times its scale, exact."""
        scales = self.scales.float()
        size = self.quantization.group_size
        if size is None:
            return self.codes_as_int8().float() * scales[:, None]
        return self.codes_as_int8().float() * scales.repeat_interleave(size, dim=1)[:, : self.inputs]


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix, ready to be multiplied with."""

    shape: tuple[int, int]
    """(outputs, inputs), as the model has them."""
    quantization: Quantization
    codes: Tensor
    scales: Tensor
    kernel: RowKernel | None
    """With which the matrix is multiplied, dequantised or natively; None where codes are packed."""
    native: NativeMatrix | None = None
    """Where it is multiplied natively."""
    tiled: TiledMatrix | None = None
    """Where it is multiplied by our kernel of a device."""

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def multiply(self, x_PI: Tensor, out_PO: Tensor | None = None) -> Tensor:
        """x @ weight.T, as RowKernel.multiply."""
        outputs, inputs = self.shape
        if self.kernel is not None and self.native is not None:
            return multiply_natively(self.kernel.level, x_PI, self.native, out_PO)
        if self.tiled is not None:
            return multiply_tiled(x_PI, self.tiled, out_PO)
        if self.kernel is not None:
            return self._multiply_dequantised(self.kernel, x_PI, out_PO)
        missing = padded_shape(self.shape, self.quantization)[1] - inputs
        x_PI = pad(x_PI, (0, missing)) if missing else x_PI.contiguous()
        if self.quantization.group_size is None:
            y_PO = torch._weight_int8pack_mm(x_PI, self.codes, self.scales)
        else:
            y_PO = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x_PI, self.codes, self.quantization.group_size, self.scales
            )
        return y_PO[:, :outputs] if out_PO is None else out_PO.copy_(y_PO[:, :outputs])

    def _multiply_dequantised(self, kernel: RowKernel, x_PI: Tensor, out_PO: Tensor | None) -> Tensor:
        outputs, inputs = self.shape
        matrix = CanonicalMatrix(self.codes, self.scales, inputs, self.quantization)
        out_PO = x_PI.new_empty(x_PI.shape[0], outputs) if out_PO is None else out_PO
        for first in range(0, outputs, ROWS_DEQUANTISED_AT_ONCE):
            end = min(first + ROWS_DEQUANTISED_AT_ONCE, outputs)
            out_PO[:, first:end] = kernel.multiply(x_PI, matrix.rows(first, end).dequantised().to(x_PI.dtype))
        return out_PO


Weight = Tensor | PackedMatrix
"""A matrix (outputs, inputs) to multiply with, quantised or not."""


def multiply(kernel: RowKernel, x_PI: Tensor, weight_OI: Weight, out_PO: Tensor | None = None) -> Tensor:
    """x @ weight.T for a number of rows that is a multiple of the kernel's. Writes to `out_PO` where it is given."""
    if isinstance(weight_OI, PackedMatrix):
        return weight_OI.multiply(x_PI, out_PO)
    return kernel.multiply(x_PI, weight_OI, out_PO)


def linear(kernel: RowKernel, x_RI: Tensor, weight_OI: Weight) -> Tensor:
    """x @ weight.T for any number of rows. Returns (R, O), maybe a view of a padded buffer."""
    num_rows = x_RI.shape[0]
    missing = kernel.padded(num_rows) - num_rows
    if missing:
        x_RI = torch.cat((x_RI, x_RI[-1:].expand(missing, -1)))
    return multiply(kernel, x_RI, weight_OI)[:num_rows]


def stacked(matrices: Sequence[CanonicalMatrix]) -> CanonicalMatrix:
    """One below the other, as one; they have the same inputs and are quantised alike."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    codes, scales = (joined(parts) for parts in zip(*((m.codes, m.scales) for m in matrices), strict=True))
    return CanonicalMatrix(codes, scales, first.inputs, first.quantization)


def pack(matrix: CanonicalMatrix, dtype: torch.dtype) -> PackedMatrix:
    """For activations of this dtype. int8 codes that need no padding are not copied."""
    pack_codes = _pack_int8 if matrix.quantization.group_size is None else _pack_int4
    return PackedMatrix(matrix.shape, matrix.quantization, *pack_codes(matrix, dtype), kernel=None)


def keep(matrix: CanonicalMatrix, kernel: RowKernel) -> PackedMatrix:
    """To be dequantised anew for each product. The codes are not copied, nor the scales on a device."""
    scales = matrix.scales.clone() if kernel.is_on_cpu else matrix.scales
    return PackedMatrix(matrix.shape, matrix.quantization, matrix.codes, scales, kernel)


def take_as_it_is(matrix: CanonicalMatrix, kernel: RowKernel) -> PackedMatrix:
    """For our own products, which the kernel must be of. Copies nothing."""
    native = coded_matrix(matrix.codes, matrix.scales, matrix.inputs, matrix.quantization.group_size)
    return PackedMatrix(matrix.shape, matrix.quantization, matrix.codes, matrix.scales, kernel, native)


def take_for_device(matrix: CanonicalMatrix, kernel: RowKernel) -> PackedMatrix:
    """For our kernel of a device. Copies nothing."""
    tiled = tiled_matrix(matrix.codes, matrix.scales, matrix.inputs, matrix.quantization.group_size)
    return PackedMatrix(matrix.shape, matrix.quantization, matrix.codes, matrix.scales, kernel, tiled=tiled)


def padded_shape(shape: tuple[int, int], quantization: Quantization) -> tuple[int, int]:
    """What the kernel computes with: zeros are added up to sizes that it can take."""
    multiples = INT8_MULTIPLES
    if quantization.group_size is not None:
        multiples = (INT4_OUTPUTS, quantization.group_size)
    outputs, inputs = (
        -(-size // multiple) * multiple for size, multiple in zip(shape, multiples, strict=True)
    )
    return outputs, inputs


def packed_bytes(shape: tuple[int, int], quantization: Quantization, dtype: torch.dtype) -> int:
    """Of `pack`, where its codes are a copy."""
    outputs, inputs = padded_shape(shape, quantization)
    codes = outputs * inputs if quantization.group_size is None else outputs * inputs // 2
    return codes + packed_scale_bytes(shape, quantization, dtype)


def packed_scale_bytes(shape: tuple[int, int], quantization: Quantization, dtype: torch.dtype) -> int:
    """Of `pack`: int4 has a zero point, which is zero, beside each scale."""
    outputs, inputs = padded_shape(shape, quantization)
    if quantization.group_size is None:
        return outputs * dtype.itemsize
    return 2 * outputs * (inputs // quantization.group_size) * dtype.itemsize


def _pack_int8(matrix: CanonicalMatrix, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outputs, inputs = padded_shape(matrix.shape, matrix.quantization)
    missing = outputs - matrix.shape[0], inputs - matrix.shape[1]
    codes = matrix.codes_as_int8()
    if any(missing):
        codes = pad(codes, (0, missing[1], 0, missing[0]))
    return codes, pad(matrix.scales, (0, missing[0])).to(dtype, copy=True)


def _pack_int4(matrix: CanonicalMatrix, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = matrix.quantization.group_size
    assert size is not None
    outputs, inputs = padded_shape(matrix.shape, matrix.quantization)
    missing = outputs - matrix.shape[0]
    bytes_OB = pad(matrix.codes, (0, inputs // 2 - matrix.codes.shape[1], 0, missing))
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
    for first in range(0, outputs, ROWS_PACKED_AT_ONCE):
        rows = bytes_OB[first : first + ROWS_PACKED_AT_ONCE]
        codes = torch.stack((rows & 15, rows >> 4), dim=-1).view(len(rows), inputs).to(torch.int32)
        block = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_K_TILES)
        packed[first : first + ROWS_PACKED_AT_ONCE] = block.view(len(rows), inputs // 2)
    scales_and_zeros = torch.zeros(inputs // size, outputs, 2, dtype=dtype)
    scales_and_zeros[:, : matrix.shape[0], 0] = matrix.scales.t()
    return packed, scales_and_zeros
