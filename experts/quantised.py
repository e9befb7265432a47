"""From an expert's record to weights: as they are, or quantised and packed for this machine's kernel.

Chooses the product with packed codes by proof, when a worker is made: right within rounding, checked against the plain
dequantised product, since a wrong packing fails silently; and row by row the same bits whatever stands beside, as
docs/exactness.md promises. Where the kernel fails, codes are dequantised for each product. Called by `experts.worker`,
and by `router.linears` for the backbone's matrices.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from experts.device_proof import GROUPS, are_tiles_sound
from experts.devices import CPU
from experts.errors import NotRowInvariant, StoreDamaged
from experts.ffn import ExpertWeights, view_expert
from experts.native_products import VERSION, chosen_level
from experts.numerics import (
    MANY_ROWS_OUTPUTS,
    MAX_TESTED_OUTPUTS,
    REFERENCE_ROWS,
    RowKernel,
    gives_few_rows_their_bits,
    gives_many_rows_their_bits,
    one_thread,
)
from experts.packed_matrix import (
    ROWS_DEQUANTISED_AT_ONCE,
    CanonicalMatrix,
    PackedMatrix,
    PackedProduct,
    keep,
    linear,
    pack,
    packed_scale_bytes,
    padded_shape,
    take_as_it_is,
    take_for_device,
)
from experts.store import TORCH_DTYPES, ExpertStore
from experts.triton_products import failures, product_name, why_not_there
from extraction.manifest import ExpertRecord
from extraction.quantise import INT8_LIMIT, SCALE_BYTES, Quantization

logger = logging.getLogger(__name__)

TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float16: 4e-3}
"""Largest error of a product against the plain one, in parts of the largest output. bfloat16 keeps eight bits of each
weight and output: 3e-3 was seen. Of wrong packings the error is about 1."""


Held = TypeVar("Held", covariant=True)


class RecordForm(Protocol[Held]):
    """What a store's records become in memory."""

    def loaded_bytes(self, record: ExpertRecord) -> int:
        """What the expert takes in memory, known before it is read."""
        ...

    def is_in_place(self, record: ExpertRecord) -> bool:
        """Whether the weights are the record's own bytes, and nothing beside them."""
        ...

    def weights(self, record: ExpertRecord, raw: Tensor) -> Held:
        """raw: the record's bytes, not to be used by others afterwards. Raises StoreDamaged, ValueError."""
        ...


class ExpertForm(RecordForm[ExpertWeights], Protocol):
    """How a store's experts lie in memory."""

    @property
    def class_suffix(self) -> str:
        """What it adds to the name of the numerics class."""
        ...


@dataclass(frozen=True)
class FloatForm:
    """Experts in a float dtype, converted to the one that is computed with."""

    dtype: torch.dtype
    widths: Mapping[str, int]
    class_suffix: str = ""

    def loaded_bytes(self, record: ExpertRecord) -> int:
        return record.nbytes // TORCH_DTYPES[record.dtype].itemsize * self.dtype.itemsize

    def is_in_place(self, record: ExpertRecord) -> bool:
        return TORCH_DTYPES[record.dtype] == self.dtype

    def weights(self, record: ExpertRecord, raw: Tensor) -> ExpertWeights:
        stored = TORCH_DTYPES[record.dtype]
        if stored != self.dtype:
            raw = raw.view(stored).to(self.dtype).view(torch.uint8)
        return view_expert(raw, self.dtype, self.widths[record.key.component])


@dataclass(frozen=True)
class QuantisedForm:
    """Experts as codes and scales, multiplied by a product that was proven for these shapes."""

    quantization: Quantization
    dtype: torch.dtype
    widths: Mapping[str, int]
    kernel: RowKernel
    product: PackedProduct

    @property
    def class_suffix(self) -> str:
        return product_suffix(self.quantization, self.product)

    def loaded_bytes(self, record: ExpertRecord) -> int:
        shapes = self._shapes(record)
        if self._takes_it_as_it_is(shapes):
            return record.nbytes
        if self.product != "pack":
            return record.nbytes + sum(map(self.quantization.scale_bytes, shapes))
        scales = sum(packed_scale_bytes(shape, self.quantization, self.dtype) for shape in shapes)
        padded = [padded_shape(shape, self.quantization) for shape in shapes]
        if self.quantization.scheme == "int4":
            return scales + sum(outputs * inputs // 2 for outputs, inputs in padded)
        if padded == shapes:
            return scales + record.nbytes  # the codes are views of the record
        return scales + sum(outputs * inputs for outputs, inputs in padded)

    def is_in_place(self, record: ExpertRecord) -> bool:
        return self._takes_it_as_it_is(self._shapes(record))

    def weights(self, record: ExpertRecord, raw: Tensor) -> ExpertWeights:
        shapes = self._shapes(record)
        is_view = self.product != "pack" or all(
            padded_shape(shape, self.quantization) == shape for shape in shapes
        )
        matrices = []
        codes_at, scales_at = 0, sum(map(self.quantization.code_bytes, shapes))
        for shape in shapes:
            code_bytes, scale_bytes = (
                self.quantization.code_bytes(shape),
                self.quantization.scale_bytes(shape),
            )
            codes = raw[codes_at : codes_at + code_bytes].view(self.quantization.code_shape(shape))
            scales = raw[scales_at : scales_at + scale_bytes]
            if not self._takes_it_as_it_is(shapes):
                scales = scales.clone()
            scales = scales.view(torch.bfloat16).view(self.quantization.scale_shape(shape))
            # A view would keep the whole record in memory beside the other matrix's padded copy.
            codes = codes if is_view or self.quantization.scheme == "int4" else codes.clone()
            matrices.append(CanonicalMatrix(codes, scales, shape[1], self.quantization))
            codes_at, scales_at = codes_at + code_bytes, scales_at + scale_bytes
        gate_up, down = (packed_for(self.product, matrix, self.dtype, self.kernel) for matrix in matrices)
        return ExpertWeights(gate_up, down)

    def _takes_it_as_it_is(self, shapes: Sequence[tuple[int, int]]) -> bool:
        is_able = self.product in ("native", "triton") or not self.kernel.is_on_cpu
        return is_able and self._has_aligned_scales(shapes)

    def _has_aligned_scales(self, shapes: Sequence[tuple[int, int]]) -> bool:
        """Whether an even number of code bytes lies before them, so that they can stay where they are."""
        return sum(map(self.quantization.code_bytes, shapes)) % SCALE_BYTES == 0

    def _shapes(self, record: ExpertRecord) -> list[tuple[int, int]]:
        """Of gate and up together, and of down. Raises StoreDamaged."""
        return expert_shapes(record, self.quantization, self.widths[record.key.component])


def product_suffix(quantization: Quantization, product: PackedProduct) -> str:
    """In the name of a numerics class."""
    version = VERSION if product == "native" else 1
    return f"/{quantization.name}/{product_name() if product == 'triton' else product}-{version}"


def expert_form(
    store: ExpertStore, kernel: RowKernel, dtype: torch.dtype, widths: Mapping[str, int]
) -> ExpertForm:
    """For the components that have a width here. Raises NotRowInvariant or StoreDamaged."""
    quantization = store.quantization
    if quantization is None:
        return FloatForm(dtype, widths)
    experts = [
        expert_shapes(store.record(key), quantization, width)
        for component, width in widths.items()
        for key in store.expert_keys(component)[:1]  # all are of one size
    ]
    shapes = sorted({shape for expert in experts for shape in expert})
    product = choose_product(shapes, quantization, dtype, kernel)
    if product == "triton" and not all(_is_grouping_proven(e, quantization, dtype, kernel) for e in experts):
        product = choose_product(shapes, quantization, dtype, kernel, is_tiled=False)
    return QuantisedForm(quantization, dtype, widths, kernel, product)


def planned_form(
    store: ExpertStore, dtype: torch.dtype, widths: Mapping[str, int], device: torch.device = CPU
) -> ExpertForm:
    """The form that `expert_form` nearly always finds, for planning only: nothing is proven."""
    quantization = store.quantization
    if quantization is None:
        return FloatForm(dtype, widths)
    kernel = RowKernel(1, device=device)
    return QuantisedForm(quantization, dtype, widths, kernel, planned_product(dtype, device))


def planned_product(dtype: torch.dtype, device: torch.device = CPU) -> PackedProduct:
    """The product that this machine nearly always finds, for planning only."""
    if device.type != "cpu":
        return "dequantise"  # which takes the memory that our own kernel takes
    return "pack" if chosen_level(dtype) is None else "native"


def expert_shapes(record: ExpertRecord, quantization: Quantization, width: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of gate and up together, and of down, from the sizes that the index gives.

    Raises StoreDamaged where these are not those of matrices of this width.
    """
    row_bytes = quantization.code_bytes((1, width))
    expert_width = record.parts[0].nbytes // row_bytes
    gate, down = (expert_width, width), (width, expert_width)
    expected = [
        *(quantization.code_bytes(shape) for shape in (gate, gate, down)),
        *(quantization.scale_bytes(shape) for shape in (gate, gate, down)),
    ]
    if not expert_width or [part.nbytes for part in record.parts] != expected:
        part = record.parts[0]
        raise StoreDamaged(part.file, f"expert {tuple(record.key)} does not have matrices {width} wide")
    return [(2 * expert_width, width), down]


def choose_product(
    shapes: list[tuple[int, int]],
    quantization: Quantization,
    dtype: torch.dtype,
    kernel: RowKernel,
    *,
    is_tiled: bool = True,
) -> PackedProduct:
    """The fastest product that passes for all shapes. is_tiled: whether a device's may be our own kernel.

    Raises NotRowInvariant when none passes, torch.OutOfMemoryError.
    """
    for product in _candidates(dtype, kernel, is_tiled):
        failure = next(
            (shape for shape in shapes if not _is_proven(product, shape, quantization, dtype, kernel)), None
        )
        if failure is None:
            return product
        logger.warning(
            "%s %s for matrices of %s does not pass its test here", quantization.name, product, failure
        )
    raise NotRowInvariant(f"{quantization.name} products", str(dtype))


def _candidates(dtype: torch.dtype, kernel: RowKernel, is_tiled: bool) -> list[PackedProduct]:
    if kernel.is_on_cpu:
        return ["native", "pack", "dequantise"] if kernel.product == "native" else ["pack", "dequantise"]
    is_tiled = is_tiled and why_not_there(kernel.device, dtype) is None
    return ["triton", "dequantise"] if is_tiled else ["dequantise"]


def _is_proven(
    product: PackedProduct,
    shape: tuple[int, int],
    quantization: Quantization,
    dtype: torch.dtype,
    kernel: RowKernel,
) -> bool:
    """Close to the plain product, and every row by itself. Of a large matrix the first rows, as `calibrate` does."""
    generator = torch.Generator().manual_seed(4)
    shape = (min(shape[0], MAX_TESTED_OUTPUTS), shape[1])
    matrix = _random_matrix(shape, quantization, generator).on(kernel.device)
    x = torch.randn(REFERENCE_ROWS, shape[1], generator=generator).to(kernel.device, dtype)
    try:
        packed = packed_for(product, matrix, dtype, kernel)
        part = packed_for(product, matrix.rows(0, MANY_ROWS_OUTPUTS), dtype, kernel)
        with one_thread():
            reference = packed.multiply(x)
    except torch.OutOfMemoryError:
        raise  # a moment's, which must not decide between two classes
    except failures() as error:
        logger.warning("%s %s: %s", quantization.name, product, str(error).split("\n")[0])
        return False
    return (
        _error_ratio(reference, x, matrix) <= TOLERANCES[dtype]
        and gives_few_rows_their_bits(lambda rows: linear(kernel, rows, packed), x, reference)
        and gives_many_rows_their_bits(
            lambda rows: linear(kernel, rows, part), x, reference[:, :MANY_ROWS_OUTPUTS]
        )
    )


def _is_grouping_proven(
    shapes: Sequence[tuple[int, int]], quantization: Quantization, dtype: torch.dtype, kernel: RowKernel
) -> bool:
    """Whether experts of these shapes keep a row's bits where a device computes all of a call at once."""
    if kernel.grouping != "triton":
        return True
    generator = torch.Generator().manual_seed(5)
    experts = []
    for _ in range(GROUPS):
        matrices = (_random_matrix(shape, quantization, generator).on(kernel.device) for shape in shapes)
        experts.append(ExpertWeights(*(take_for_device(matrix, kernel) for matrix in matrices)))
    return are_tiles_sound(experts, kernel, dtype)


def _error_ratio(found: Tensor, x: Tensor, matrix: CanonicalMatrix) -> float:
    """Largest error against the plain product in float64, in parts of that one's largest value."""
    error = largest = 0.0
    for first in range(0, matrix.shape[0], ROWS_DEQUANTISED_AT_ONCE):
        rows = matrix.rows(first, first + ROWS_DEQUANTISED_AT_ONCE)
        plain = x.double() @ rows.dequantised().double().t()
        error = max(error, float((found[:, first : first + len(rows.codes)].double() - plain).abs().max()))
        largest = max(largest, float(plain.abs().max()))
    return error / largest


def packed_for(
    product: PackedProduct, matrix: CanonicalMatrix, dtype: torch.dtype, kernel: RowKernel
) -> PackedMatrix:
    """The matrix as the product wants it."""
    if product == "native":
        return take_as_it_is(matrix, kernel)
    if product == "triton":
        return take_for_device(matrix, kernel)
    return pack(matrix, dtype) if product == "pack" else keep(matrix, kernel)


def _random_matrix(
    shape: tuple[int, int], quantization: Quantization, generator: torch.Generator
) -> CanonicalMatrix:
    codes = torch.randint(256, quantization.code_shape(shape), generator=generator, dtype=torch.uint8)
    spread = shape[1] ** -0.5 / (INT8_LIMIT if quantization.scheme == "int8" else 8)
    scales = torch.rand(quantization.scale_shape(shape), generator=generator).add_(0.5).mul_(spread)
    return CanonicalMatrix(codes, scales.bfloat16(), shape[1], quantization)
