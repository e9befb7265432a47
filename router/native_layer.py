"""A decoder layer's weights as the C source in `experts/native` takes them.

Every pointer that goes in is of a tensor checked here. Made by `router.weights`, computed by `router.native_step`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.expert_table import ExpertTable
from experts.native_products import DTYPES, NativeMatrix, float_matrix
from experts.numerics import RowKernel
from experts.packed_matrix import PackedMatrix, Weight
from router.model_config import ModelConfig
from router.native_attention import expect
from router.native_structures import FormStructure, LayerStructure, LinearStructure


@dataclass(frozen=True)
class LayerMatrices:
    """Weights of a layer that can be computed in two calls; checked by `NativeLayer`."""

    input_norm_D: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    post_norm_D: Tensor
    qkv_OD: Weight
    output_DO: Weight
    gate_ED: Tensor


class NativeLayer:
    """One layer as C takes it. Holds on to its weights."""

    def __init__(self, matrices: LayerMatrices, natives: tuple[NativeMatrix, ...]) -> None:
        """Use `of`."""
        self.matrices, self._natives = matrices, natives
        self._table: ExpertTable | None = None
        norms = (matrices.input_norm_D, matrices.q_norm, matrices.k_norm, matrices.post_norm_D)
        addresses = (None if norm is None else norm.data_ptr() for norm in norms)
        self.structure = LayerStructure(*addresses, *map(LinearStructure.of, natives))
        self.address = ctypes.addressof(self.structure)

    @classmethod
    def of(
        cls, matrices: LayerMatrices, config: ModelConfig, kernel: RowKernel, dtype: torch.dtype
    ) -> NativeLayer | None:
        """None where it has something that the two calls do not do. Raises ValueError where shapes do not fit."""
        has_more = config.qk_norm == "whole_width" or config.clip_qkv is not None
        if kernel.product != "native" or has_more or dtype not in DTYPES:
            return None
        width, head = config.hidden_size, config.head_dim
        natives = tuple(map(native_matrix, (matrices.qkv_OD, matrices.output_DO, matrices.gate_ED)))
        qkv, output, gate = natives
        if qkv is None or output is None or gate is None:
            return None
        for matrix in (qkv, output, gate):
            expect_rows_of(matrix, dtype)
        shapes = [(matrix.outputs, matrix.inputs) for matrix in (qkv, output, gate)]
        expected = (
            (config.q_width + 2 * config.kv_width, width),
            (width, config.q_width),
            (config.num_experts, width),
        )
        if shapes != [*expected]:
            raise ValueError(f"matrices of {shapes} where {expected} were expected")
        for norm, size in (
            *((norm_D, width) for norm_D in (matrices.input_norm_D, matrices.post_norm_D)),
            *((norm, head) for norm in (matrices.q_norm, matrices.k_norm)),
        ):
            if norm is not None:
                expect(norm, (size,), dtype)
        return cls(matrices, (qkv, output, gate))

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


def expect_rows_of(matrix: NativeMatrix, dtype: torch.dtype) -> None:
    """Raises ValueError where a matrix of floats is not multiplied with rows of that dtype."""
    if matrix.weights.dtype.is_floating_point and matrix.weights.dtype != dtype:
        raise ValueError(f"a matrix of {matrix.weights.dtype} for rows of {dtype}")


def native_matrix(weight: Weight) -> NativeMatrix | None:
    """For our own products; None where it is packed for another."""
    return weight.native if isinstance(weight, PackedMatrix) else float_matrix(weight)
