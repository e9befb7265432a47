"""A decoder layer in two calls to the C source in `experts/native`: attention, and the mixture of experts.

The same operations in the same dtypes as one call for each (`router.decoder_layer`, `router.moe_block`), so the same
bits; what is saved are the calls between them, which a step of a small model mostly consists of, and the threads'
meetings, which a large one's spends time on. Every pointer that goes in is of a tensor checked here. Called by
`router.decoder_layer`.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.expert_table import ExpertTable
from experts.native_products import (
    DTYPES,
    LEVELS,
    OUT_OF_MEMORY,
    PAUSED,
    Library,
    NativeMatrix,
    float_matrix,
    library_for,
)
from experts.numerics import RowKernel
from experts.packed_matrix import PackedMatrix, Weight
from router.attention import BLOCK_POSITIONS
from router.kv_cache import KvPool
from router.model_config import ModelConfig
from router.native_attention import Places, expect
from router.scoring import Routing

ATTENTION_PHASES = ("norm", "qkv", "place", "attend", "pack", "output")
EXPERTS_PHASES = ("norm", "gate", "route", "sort", "gate_up", "down", "combine")
"""Of the two calls, one after another; `sort` is of rows by expert."""

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Form(ctypes.Structure):
    _fields_ = [(name, _INT64) for name in ("kind", "group", "outputs", "inputs")]


class LinearStructure(ctypes.Structure):
    """`linear` in layer.c."""

    _fields_ = [("form", _Form), ("weights", _POINTER), ("scales", _POINTER)]

    @classmethod
    def of(cls, matrix: NativeMatrix) -> LinearStructure:
        return cls(_Form(*matrix.form), *matrix.pointers)


class _Layer(ctypes.Structure):
    """`layer` in layer.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((name, LinearStructure) for name in ("qkv", "output", "gate")),
        *((name, _Form) for name in ("gate_up", "down")),
        ("experts", _POINTER),
    ]


_STEP_NUMBERS = (
    *(
        "level",
        "is_narrow",
        "width",
        "heads",
        "kv_heads",
        "head_width",
        "num_experts",
        "top_k",
        "is_normalised",
    ),
    *("num_tokens", "num_spans", "most_blocks", "block_bytes", "layer_bytes"),
)
_STEP_POINTERS = ("cos", "sin", "keys", "values", "blocks", "offsets", "tables", "spans", "ended_ns")


class _Step(ctypes.Structure):
    """`step` in layer.c."""

    _fields_ = [
        *((name, _INT64) for name in _STEP_NUMBERS),
        *((name, _POINTER) for name in _STEP_POINTERS),
        *((name, _FLOAT) for name in ("eps", "scale")),
    ]


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
        self.structure = _Layer(*addresses, *map(LinearStructure.of, natives))
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
        self.structure.gate_up, self.structure.down = _Form(*table.forms[:4]), _Form(*table.forms[4:])
        self.structure.experts = table.addresses.buffer_info()[0]


def expect_rows_of(matrix: NativeMatrix, dtype: torch.dtype) -> None:
    """Raises ValueError where a matrix of floats is not multiplied with rows of that dtype."""
    if matrix.weights.dtype.is_floating_point and matrix.weights.dtype != dtype:
        raise ValueError(f"a matrix of {matrix.weights.dtype} for rows of {dtype}")


def native_matrix(weight: Weight) -> NativeMatrix | None:
    """For our own products; None where it is packed for another."""
    return weight.native if isinstance(weight, PackedMatrix) else float_matrix(weight)


class OpenHalf:
    """Half a layer that may pause. Holds on to its memory, and to the rows that it reads and writes."""

    def __init__(self, library: Library, address: int | None, hidden_TD: Tensor, out_TD: Tensor) -> None:
        """Raises MemoryError for no address."""
        if address is None:
            raise MemoryError(f"no memory for a layer of {hidden_TD.shape[0]} rows")
        self._library, self._address = library, address
        self.hidden_TD, self.out_TD = hidden_TD, out_TD
        self._end = weakref.finalize(self, library.end_half, address)
        self._end.atexit = False

    def run(self, until_ns: int | None) -> bool:
        """Whether it is done now. until_ns: monotonic clock after which nothing more is begun, but for one piece; None
        leaves nothing. Raises MemoryError."""
        library = self._library
        code = library.run_half(self._address, until_ns or 0, library.run_in_threads, torch.get_num_threads())
        if code == OUT_OF_MEMORY:
            raise MemoryError(f"no memory for a layer of {self.hidden_TD.shape[0]} rows")
        return code != PAUSED

    def close(self) -> None:
        self._end()


class NativeStep:
    """What the layers of one step share, as C takes it. Holds on to its tensors."""

    def __init__(
        self,
        level: str,
        config: ModelConfig,
        dtype: torch.dtype,
        rotation: tuple[Tensor, Tensor],
        places: Places,
        *,
        is_timed: bool = False,
    ) -> None:
        """rotation: cos and sin, (T, 1, head_dim) float32. Raises ValueError where anything does not fit."""
        self._config, self._dtype, self._rotation, self.places = config, dtype, rotation, places
        self._ended_ns = array("q", bytes(8 * len(EXPERTS_PHASES))) if is_timed else None
        self.phase_s: dict[str, float] = {}
        """Of the call before, by phase, where it is timed."""
        self._library = library_for(level)
        self._pool: KvPool | None = None
        self._shape = (places.num_tokens, config.hidden_size)
        for table in rotation:
            expect(table, (places.num_tokens, 1, config.head_dim), torch.float32)
        if config.head_dim % 2 or not 0 < config.experts_per_token <= max(config.num_experts, 1):
            raise ValueError(
                f"heads of {config.head_dim}, {config.experts_per_token} of {config.num_experts}"
            )
        arrays = (places.blocks_T, places.offsets_T, places.tables, places.spans)
        block_bytes = config.num_kv_heads * BLOCK_POSITIONS * config.head_dim * dtype.itemsize
        self.structure = _Step(
            *(LEVELS.index(level), dtype == torch.bfloat16, config.hidden_size),
            *(config.num_heads, config.num_kv_heads, config.head_dim),
            *(config.num_experts, config.experts_per_token, config.normalise_top_k),
            *(places.num_tokens, places.num_spans, places.most_blocks, block_bytes, 0),
            *(rotation[0].data_ptr(), rotation[1].data_ptr(), None, None),
            *(numbers.buffer_info()[0] for numbers in arrays),
            None if self._ended_ns is None else self._ended_ns.buffer_info()[0],
            *(config.rms_norm_eps, config.head_dim**-0.5),
        )
        self._address = ctypes.addressof(self.structure)
        self._chosen_TK: array[int] | None = None
        self._weights_TK = array("f")
        self._used_E: array[int] | None = None
        self._open: OpenHalf | None = None

    def attention(
        self,
        layer: NativeLayer,
        index: int,
        hidden_TD: Tensor,
        pool: KvPool,
        until_ns: int | None = None,
    ) -> Tensor | None:
        """hidden + output(attention(norm(hidden))), (T, D) in the model's dtype; writes keys and values to the cache.

        index: of the layer in the cache. until_ns: see `OpenHalf.run`; where something is left, None is returned, and
        the next call with the same arguments goes on. Raises ValueError where anything does not fit, MemoryError.
        """
        if self._open is not None:
            return self._go_on(self._open, until_ns)
        self._bind(pool)
        expect(hidden_TD, self._shape, self._dtype)
        if not 0 <= index < pool.keys.shape[0]:
            raise ValueError(f"no layer {index} in a cache of {pool.keys.shape[0]}")
        out_TD = torch.empty_like(hidden_TD)
        if until_ns is not None:
            address = self._library.begin_attention(
                self._address,
                layer.address,
                index,
                self._config.window(index) or 0,
                hidden_TD.data_ptr(),
                out_TD.data_ptr(),
                torch.get_num_threads(),
            )
            return self._go_on(OpenHalf(self._library, address, hidden_TD, out_TD), until_ns)
        began_ns = time.monotonic_ns()
        self._check(
            self._library.attention_half(
                self._address,
                layer.address,
                index,
                self._config.window(index) or 0,
                hidden_TD.data_ptr(),
                out_TD.data_ptr(),
                self._library.run_in_threads,
                torch.get_num_threads(),
            )
        )
        self._note_phases(ATTENTION_PHASES, began_ns)
        return out_TD

    @property
    def used(self) -> list[int]:
        """The experts that `experts` used, ascending."""
        return [] if self._used_E is None else self._used_E[: self._used_E[-1]].tolist()

    def experts(
        self, layer: NativeLayer, table: ExpertTable, hidden_TD: Tensor, until_ns: int | None = None
    ) -> Tensor | None:
        """hidden + experts(norm(hidden)) by the checkpoint's own routing, (T, D) in the model's dtype.

        until_ns: as of `attention`. Raises ValueError where anything does not fit, MemoryError.
        """
        if self._open is not None:
            return self._go_on(self._open, until_ns)
        config = self._config
        layer.use(table, config.hidden_size, config.num_experts, self._dtype)
        expect(hidden_TD, self._shape, self._dtype)
        if self._chosen_TK is None or self._used_E is None:
            self._chosen_TK = array("q", bytes(8 * self._shape[0] * config.experts_per_token))
            self._weights_TK = array("f", bytes(4 * self._shape[0] * config.experts_per_token))
            self._used_E = array("q", bytes(8 * (config.num_experts + 1)))
        out_TD = torch.empty_like(hidden_TD)
        used = self._used_E.buffer_info()[0]
        choices = self._chosen_TK.buffer_info()[0], self._weights_TK.buffer_info()[0]
        numbers = *choices, used, used + 8 * config.num_experts
        if until_ns is not None:
            address = self._library.begin_experts(
                self._address,
                layer.address,
                hidden_TD.data_ptr(),
                out_TD.data_ptr(),
                *numbers,
                torch.get_num_threads(),
            )
            return self._go_on(OpenHalf(self._library, address, hidden_TD, out_TD), until_ns)
        began_ns = time.monotonic_ns()
        self._check(
            self._library.experts_half(
                self._address,
                layer.address,
                hidden_TD.data_ptr(),
                out_TD.data_ptr(),
                *numbers,
                self._library.run_in_threads,
                torch.get_num_threads(),
            )
        )
        self._note_phases(EXPERTS_PHASES, began_ns)
        return out_TD

    def _go_on(self, half: OpenHalf, until_ns: int | None) -> Tensor | None:
        self._open = half
        if not half.run(until_ns):
            return None
        self._open = None
        half.close()
        return half.out_TD

    def _bind(self, pool: KvPool) -> None:
        if pool is self._pool:
            return
        config, shape = self._config, pool.keys.shape
        for cache in (pool.keys, pool.values):
            expect(
                cache,
                (shape[0], shape[1], config.num_kv_heads, BLOCK_POSITIONS, config.head_dim),
                self._dtype,
            )
        if self.places.largest_block >= shape[1]:
            raise ValueError(f"no block {self.places.largest_block} in a cache of {tuple(shape)}")
        structure = self.structure
        structure.layer_bytes = shape[1] * structure.block_bytes
        structure.keys, structure.values = pool.keys.data_ptr(), pool.values.data_ptr()
        self._pool = pool

    @property
    def chosen(self) -> list[int]:
        """The experts of the layer before, token after token, best first."""
        return [] if self._chosen_TK is None else self._chosen_TK.tolist()

    def routing(self) -> Routing:
        """How `experts` routed the rows of the layer before; the caller's own."""
        assert self._chosen_TK is not None
        shape = self._shape[0], self._config.experts_per_token
        experts_TK = torch.frombuffer(self._chosen_TK, dtype=torch.int64).view(shape)
        return Routing(
            experts_TK.clone(), torch.frombuffer(self._weights_TK, dtype=torch.float32).view(shape).clone()
        )

    def _note_phases(self, names: Sequence[str], began_ns: int) -> None:
        if self._ended_ns is not None:
            ends = self._ended_ns[: len(names)]
            self.phase_s = {
                name: (end - begin) * 1e-9
                for name, begin, end in zip(names, (began_ns, *ends), ends, strict=False)
            }

    def _check(self, code: int) -> None:
        if code:
            raise MemoryError(f"no memory for a layer of {self._shape[0]} rows")
