"""The last norm, the head and the likeliest token in one call to the C source in `experts/native`.

As the norm and the product one after another (`router.backbone`), with the same bits. Every pointer that goes in is of
a tensor checked here. Called by `router.backbone`.
"""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch import Tensor

from experts.native_products import LEVELS, library_for
from experts.packed_matrix import Weight
from router.native_attention import expect
from router.native_layer import expect_rows_of, native_matrix
from router.native_structures import LinearStructure


class NativeHead:
    """Norm and head as C takes them. Holds on to its weights."""

    def __init__(self, level: str, norm_D: Tensor, head_VD: Weight, eps: float) -> None:
        """Use `of`."""
        matrix = native_matrix(head_VD)
        assert matrix is not None
        self._level, self._norm_D, self._matrix, self._eps = level, norm_D, matrix, eps
        self._structure = LinearStructure.of(matrix)

    @classmethod
    def of(cls, level: str, norm_D: Tensor, head_VD: Weight, eps: float) -> NativeHead | None:
        """None where the head is packed for another product."""
        return None if native_matrix(head_VD) is None else cls(level, norm_D, head_VD, eps)

    def logits(self, hidden_LD: Tensor) -> tuple[Tensor, list[int]]:
        """(L, V) float32, rounded to the hidden states' dtype, and each row's first largest logit, or -1 where one is
        not finite.

        Raises ValueError where anything does not fit, MemoryError.
        """
        num_rows, width = hidden_LD.shape
        matrix, dtype = self._matrix, self._norm_D.dtype
        expect(hidden_LD, (num_rows, matrix.inputs), dtype)
        expect(self._norm_D, (width,), dtype)
        expect_rows_of(matrix, dtype)
        logits_LV = torch.empty(num_rows, matrix.outputs)
        best = array("q", bytes(8 * num_rows))
        found = library_for(self._level)
        code = found.head(
            LEVELS.index(self._level),
            dtype == torch.bfloat16,
            hidden_LD.data_ptr(),
            num_rows,
            width,
            self._norm_D.data_ptr(),
            self._eps,
            ctypes.addressof(self._structure),
            logits_LV.data_ptr(),
            best.buffer_info()[0],
            found.run_in_threads,
            torch.get_num_threads(),
        )
        if code:
            raise MemoryError(f"no memory for the logits of {num_rows} rows")
        return logits_LV, best.tolist()
