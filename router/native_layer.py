"""A decoder layer's weights as the C source in `experts/native` takes them.

Every pointer that goes in is of a tensor checked here. Made by `router.weights`, computed by `router.native_step`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.expert_table import ExpertTable
from experts.ffn import ExpertWeights
from experts.native_products import DTYPES, GatedMatrices, NativeMatrix, float_matrix
from experts.numerics import RowKernel
from experts.packed_matrix import PackedMatrix, Weight
from router.model_config import ModelConfig
from router.native_attention import expect
from router.native_structures import ExpertStructure, FormStructure, LayerStructure, LinearStructure

_NOTHING = LinearStructure()
"""In place of a matrix that a layer does not have."""


@dataclass(frozen=True)
class SharedMatrices:
    """Of the expert that every row passes."""

    gate_1D: Tensor
    weights: ExpertWeights


@dataclass(frozen=True)
class LayerMatrices:
    """Weights of a layer; checked by `NativeLayer`. What a family does not have is None."""

    input_norm_D: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    post_norm_D: Tensor
    qkv_bias_O: Tensor | None
    output_bias_D: Tensor | None
    qkv_OD: Weight
    output_DO: Weight
    gate_ED: Tensor | None
    """None of a layer without experts."""
    shared: SharedMatrices | None = None
    dense: ExpertWeights | None = None
    """Of a layer without experts."""

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """As C has them."""
        return (
            *(self.input_norm_D, self.q_norm, self.k_norm, self.post_norm_D),
            *(self.qkv_bias_O, self.output_bias_D),
        )


class NativeLayer:
    """One layer as C takes it. Holds on to its weights."""

    def __init__(
        self,
        matrices: LayerMatrices,
        natives: tuple[NativeMatrix, ...],
        shared: GatedMatrices | None,
    ) -> None:
        """Use `of`. natives: as C has them. shared: what every row passes, in a layer without experts it alone."""
        self.matrices, self._natives, self._shared = matrices, natives, shared
        self._table: ExpertTable | None = None
        linears = [LinearStructure.of(native) for native in natives]
        linears += [_NOTHING] * (4 - len(linears))
        self.structure = LayerStructure(
            *(None if vector is None else vector.data_ptr() for vector in matrices.vectors), *linears
        )
        if shared is not None:
            forms, structure = shared.forms, self.structure
            structure.shared_gate_up, structure.shared_down = (
                FormStructure(*forms[:4]),
                FormStructure(*forms[4:]),
            )
            structure.shared = ExpertStructure.from_buffer_copy(shared.addresses)
        self.address = ctypes.addressof(self.structure)

    @classmethod
    def of(
        cls, matrices: LayerMatrices, config: ModelConfig, kernel: RowKernel, dtype: torch.dtype
    ) -> NativeLayer | None:
        """None where it is not computed by our own products. Raises ValueError where shapes do not fit."""
        if kernel.product != "native" or dtype not in DTYPES:
            return None
        shared, dense = matrices.shared, matrices.dense
        weights = (matrices.qkv_OD, matrices.output_DO, matrices.gate_ED)
        given = [weight for weight in weights if weight is not None]
        given += [] if shared is None else [shared.gate_1D]
        natives = [native for weight in given if (native := native_matrix(weight)) is not None]
        of_all = dense if shared is None else shared.weights
        gated = None if of_all is None else of_all.native
        if len(natives) < len(given) or (of_all is not None and gated is None):
            return None
        for matrix in (*natives, *(gated.matrices if gated is not None else ())):
            expect_rows_of(matrix, dtype)
        _expect_shapes(
            [(native.outputs, native.inputs) for native in natives], _linear_shapes(matrices, config)
        )
        if gated is not None:
            width, inner = config.hidden_size, config.dense_width if shared is None else config.shared_width
            assert inner is not None
            _expect_shapes(
                [(matrix.outputs, matrix.inputs) for matrix in gated.matrices],
                [(2 * inner, width), (width, inner)],
            )
        for vector, size in zip(matrices.vectors, _vector_sizes(config), strict=True):
            if vector is not None:
                expect(vector, (size,), dtype)
        return cls(matrices, tuple(natives), gated)

    def use(self, table: ExpertTable, width: int, num_experts: int, dtype: torch.dtype) -> None:
        """Compute with these experts from now on. Raises ValueError where they do not fit."""
        if table is self._table:
            return
        gate_up, down = table.experts[0].matrices
        if len(table.keys) != num_experts or (gate_up.inputs, down.outputs) != (width, width):
            raise ValueError(
                f"{len(table.keys)} experts of {down.outputs} outputs, not {num_experts} of {width}"
            )
        if gate_up.weights.dtype.is_floating_point and gate_up.weights.dtype != dtype:
            raise ValueError(f"experts of {gate_up.weights.dtype} for rows of {dtype}")
        self._table = table
        self.structure.gate_up, self.structure.down = (
            FormStructure(*table.forms[:4]),
            FormStructure(*table.forms[4:]),
        )
        self.structure.experts = table.addresses.buffer_info()[0]


def _linear_shapes(matrices: LayerMatrices, config: ModelConfig) -> list[tuple[int, int]]:
    width = config.hidden_size
    shapes = [(config.q_width + 2 * config.kv_width, width), (width, config.q_width)]
    shapes += [] if matrices.gate_ED is None else [(config.num_experts, width)]
    return shapes + ([] if matrices.shared is None else [(1, width)])


def _vector_sizes(config: ModelConfig) -> tuple[int, ...]:
    """As of `LayerMatrices.vectors`."""
    width, head = config.hidden_size, config.head_dim
    is_wide = config.qk_norm == "whole_width"
    norms = (config.q_width, config.kv_width) if is_wide else (head, head)
    return (width, *norms, width, config.q_width + 2 * config.kv_width, width)


def _expect_shapes(found: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    if found != expected:
        raise ValueError(f"matrices of {found} where {expected} were expected")


def expect_rows_of(matrix: NativeMatrix, dtype: torch.dtype) -> None:
    """Raises ValueError where a matrix of floats is not multiplied with rows of that dtype."""
    if matrix.weights.dtype.is_floating_point and matrix.weights.dtype != dtype:
        raise ValueError(f"a matrix of {matrix.weights.dtype} for rows of {dtype}")


def expect_dense(layer: NativeLayer) -> None:
    """Raises ValueError for a layer with experts, or one whose matrices were not given."""
    if layer.matrices.gate_ED is not None or layer.matrices.dense is None:
        raise ValueError("no layer without experts")


def native_matrix(weight: Weight) -> NativeMatrix | None:
    """For our own products; None where it is packed for another."""
    return weight.native if isinstance(weight, PackedMatrix) else float_matrix(weight)
