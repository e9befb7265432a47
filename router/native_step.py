"""The layers of a step by the C source in `experts/native`: half a layer in a call, or many layers in one.

The same operations in the same dtypes as one call for each (`router.decoder_layer`, `router.moe_block`), so the same
bits; what is saved are the calls between them, which a step of a small model mostly consists of, and the threads'
meetings, which a large one's spends time on. Every pointer that goes in is of a tensor checked here. Called by
`router.decoder_layer` and `router.layer_run`.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experts.expert_table import ExpertTable
from experts.native_products import LEVELS, OUT_OF_MEMORY, PAUSED, Library, library_for
from router.attention import BLOCK_POSITIONS
from router.kv_cache import KvPool
from router.model_config import ModelConfig
from router.native_attention import Places, expect
from router.native_layer import NativeLayer, expect_dense
from router.native_structures import StepStructure
from router.scoring import Routing

ATTENTION_PHASES = ("norm", "qkv", "place", "attend", "pack", "output")
EXPERTS_PHASES = ("norm", "gate", "route", "sort", "gate_up", "down", "combine")
"""Of the two halves, one after another; `sort` is of rows by expert."""
_MOST_PHASES = 7
"""`PHASES` in work.h: the clocks of a half take so many places."""


def bound_in(dtype: torch.dtype, bound: float | None) -> float:
    """Of absolute values, as the model's dtype has it; 0 for none."""
    return 0.0 if bound is None else float(torch.tensor(bound, dtype=dtype))


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


class _Choices:
    """How the rows of a call's layers were routed, as C leaves it."""

    def __init__(self, num_layers: int, num_tokens: int, config: ModelConfig) -> None:
        self.num_layers, self._shape = num_layers, (num_tokens, config.experts_per_token)
        self._slots, self._room = num_tokens * config.experts_per_token, config.num_experts + 1
        self._experts = array("q", bytes(8 * num_layers * self._slots))
        self._weights = array("f", bytes(4 * num_layers * self._slots))
        self._used = array("q", bytes(8 * num_layers * self._room))
        self.addresses = tuple(
            numbers.buffer_info()[0] for numbers in (self._experts, self._weights, self._used)
        )

    def used(self, number: int) -> list[int]:
        """The experts in use in a layer, ascending."""
        row = self._used[number * self._room : (number + 1) * self._room]
        return row[: row[-1]].tolist()

    def chosen(self, number: int) -> list[int]:
        """Token after token, best first."""
        return self._experts[number * self._slots : (number + 1) * self._slots].tolist()

    def routing(self, number: int) -> Routing:
        """The caller's own."""
        part = slice(number * self._slots, (number + 1) * self._slots)
        experts, weights = self._experts[part], self._weights[part]
        return Routing(
            torch.frombuffer(experts, dtype=torch.int64).view(self._shape),
            torch.frombuffer(weights, dtype=torch.float32).view(self._shape),
        )


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
        self.config, self.dtype, self._rotation, self.places = config, dtype, rotation, places
        self._is_timed = is_timed
        self._ended_ns = array("q")
        self.attention_s: dict[str, float] = {}
        """Of the layer that is looked at, by phase of its attention, where it is timed."""
        self.experts_s: dict[str, float] = {}
        """The same of its experts."""
        self.library = library_for(level)
        self._pool: KvPool | None = None
        self.shape = (places.num_tokens, config.hidden_size)
        for table in rotation:
            expect(table, (places.num_tokens, 1, config.head_dim), torch.float32)
        if config.head_dim % 2 or not 0 < config.experts_per_token <= max(config.num_experts, 1):
            raise ValueError(
                f"heads of {config.head_dim}, {config.experts_per_token} of {config.num_experts}"
            )
        arrays = (places.blocks_T, places.offsets_T, places.tables, places.spans)
        block_bytes = config.num_kv_heads * BLOCK_POSITIONS * config.head_dim * dtype.itemsize
        self.structure = StepStructure(
            *(LEVELS.index(level), dtype == torch.bfloat16, config.hidden_size),
            *(config.num_heads, config.num_kv_heads, config.head_dim, config.qk_norm == "whole_width"),
            *(config.num_experts, config.experts_per_token, config.normalise_top_k),
            *(places.num_tokens, places.num_spans, places.most_blocks, block_bytes, 0),
            *(rotation[0].data_ptr(), rotation[1].data_ptr(), None, None),
            *(numbers.buffer_info()[0] for numbers in arrays),
            None,
            *(config.rms_norm_eps, config.head_dim**-0.5, bound_in(dtype, config.clip_qkv)),
        )
        self._address = ctypes.addressof(self.structure)
        self._choices: _Choices | None = None
        self._number = self._began_ns = 0
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
        self.bind(pool, index, index)
        expect(hidden_TD, self.shape, self.dtype)
        out_TD = torch.empty_like(hidden_TD)
        rows = hidden_TD.data_ptr(), out_TD.data_ptr()
        arguments = self._address, layer.address, index, self.config.window(index) or 0, *rows
        if until_ns is not None:
            address = self.library.begin_attention(*arguments, torch.get_num_threads())
            return self._go_on(OpenHalf(self.library, address, hidden_TD, out_TD), until_ns)
        began_ns = self._start_clocks(1)
        self._check(
            self.library.attention_half(*arguments, self.library.run_in_threads, torch.get_num_threads())
        )
        if self._is_timed:
            self.attention_s = self._phases(ATTENTION_PHASES, 0, began_ns)
        return out_TD

    def experts(
        self, layer: NativeLayer, table: ExpertTable, hidden_TD: Tensor, until_ns: int | None = None
    ) -> Tensor | None:
        """hidden + experts(norm(hidden)) by the checkpoint's own routing, (T, D) in the model's dtype.

        until_ns: as of `attention`. Raises ValueError where anything does not fit, MemoryError.
        """
        if self._open is not None:
            return self._go_on(self._open, until_ns)
        config = self.config
        layer.use(table, config.hidden_size, config.num_experts, self.dtype)
        expect(hidden_TD, self.shape, self.dtype)
        out_TD = torch.empty_like(hidden_TD)
        *choices, used = self._room_for(1).addresses
        numbers = *choices, used, used + 8 * config.num_experts
        arguments = self._address, layer.address, hidden_TD.data_ptr(), out_TD.data_ptr(), *numbers
        if until_ns is not None:
            address = self.library.begin_experts(*arguments, torch.get_num_threads())
            return self._go_on(OpenHalf(self.library, address, hidden_TD, out_TD), until_ns)
        began_ns = self._start_clocks(1)
        self._check(
            self.library.experts_half(*arguments, self.library.run_in_threads, torch.get_num_threads())
        )
        if self._is_timed:
            self.experts_s = self._phases(EXPERTS_PHASES, 0, began_ns)
        return out_TD

    def dense(self, layer: NativeLayer, hidden_TD: Tensor, until_ns: int | None = None) -> Tensor | None:
        """hidden + projections(norm(hidden)) of a layer without experts, (T, D) in the model's dtype.

        until_ns: as of `attention`. Raises ValueError where anything does not fit, MemoryError.
        """
        if self._open is not None:
            return self._go_on(self._open, until_ns)
        expect_dense(layer)
        expect(hidden_TD, self.shape, self.dtype)
        out_TD = torch.empty_like(hidden_TD)
        arguments = self._address, layer.address, hidden_TD.data_ptr(), out_TD.data_ptr()
        if until_ns is not None:
            address = self.library.begin_dense(*arguments, torch.get_num_threads())
            return self._go_on(OpenHalf(self.library, address, hidden_TD, out_TD), until_ns)
        self._start_clocks(1)
        self._check(self.library.dense_half(*arguments, self.library.run_in_threads, torch.get_num_threads()))
        return out_TD

    def expect_closed(self) -> None:
        """That no half of a layer has begun: what it was given may not be changed."""
        assert self._open is None

    def layers(
        self,
        first: int,
        layers: Sequence[tuple[NativeLayer, ExpertTable | None]],
        hidden_TD: Tensor,
        pool: KvPool,
    ) -> tuple[Tensor, float, float]:
        """Both halves of consecutive layers in one call: their last one's rows, and the seconds that the halves with
        attention and the others took.

        layers: without experts where there is no table. first: of them in the cache. `look_at` says of which one the
        rest is told. Raises ValueError where anything does not fit, MemoryError.
        """
        self.expect_closed()
        config = self.config
        self.bind(pool, first, first + len(layers) - 1)
        expect(hidden_TD, self.shape, self.dtype)
        placed = array("q")
        for index, (layer, table) in enumerate(layers, first):
            if table is None:
                expect_dense(layer)
            else:
                layer.use(table, config.hidden_size, config.num_experts, self.dtype)
            placed.extend((layer.address, index, config.window(index) or 0))
        middle_TD, out_TD = torch.empty_like(hidden_TD), torch.empty_like(hidden_TD)
        spent_ns = array("q", (0, 0))
        self._began_ns = self._start_clocks(len(layers))
        self._check(
            self.library.run_layers(
                self._address,
                placed.buffer_info()[0],
                len(layers),
                hidden_TD.data_ptr(),
                middle_TD.data_ptr(),
                out_TD.data_ptr(),
                *self._room_for(len(layers)).addresses,
                spent_ns.buffer_info()[0],
                self.library.run_in_threads,
                torch.get_num_threads(),
            )
        )
        return out_TD, spent_ns[0] * 1e-9, spent_ns[1] * 1e-9

    def look_at(self, number: int) -> None:
        """What is told of a layer is of this one of the call before, counted from 0."""
        self._number = number
        if self._is_timed:
            half = 2 * number
            began_ns = self._ended_ns[half * _MOST_PHASES - 1] if number else self._began_ns
            self.attention_s = self._phases(ATTENTION_PHASES, half, began_ns)
            began_ns = self._ended_ns[half * _MOST_PHASES + len(ATTENTION_PHASES) - 1]
            self.experts_s = self._phases(EXPERTS_PHASES, half + 1, began_ns)

    @property
    def used(self) -> list[int]:
        """The experts that the layer's rows were routed to, ascending."""
        return [] if self._choices is None else self._choices.used(self._number)

    @property
    def chosen(self) -> list[int]:
        """The experts of the layer, token after token, best first."""
        return [] if self._choices is None else self._choices.chosen(self._number)

    def routing(self) -> Routing:
        """How the layer's rows were routed; the caller's own."""
        assert self._choices is not None
        return self._choices.routing(self._number)

    def run(self, function: Callable[..., int], *arguments: int | None) -> None:
        """One of the library's functions of a step. Raises MemoryError."""
        self._check(function(self._address, *arguments, self.library.run_in_threads, torch.get_num_threads()))

    def begin(self, function: Callable[..., int | None], *arguments: int | None) -> int | None:
        """One of the library's functions of a step that begin half a layer."""
        return function(self._address, *arguments)

    def _go_on(self, half: OpenHalf, until_ns: int | None) -> Tensor | None:
        self._open = half
        if not half.run(until_ns):
            return None
        self._open = None
        half.close()
        return half.out_TD

    def bind(self, pool: KvPool, first: int, last: int) -> None:
        """Compute with this cache from now on. Raises ValueError where it does not fit, or has not these layers."""
        shape = pool.keys.shape
        if not 0 <= first <= last < shape[0]:
            raise ValueError(f"no layer {last if first >= 0 else first} in a cache of {shape[0]}")
        if pool is self._pool:
            return
        config = self.config
        for cache in (pool.keys, pool.values):
            expect(
                cache,
                (shape[0], shape[1], config.num_kv_heads, BLOCK_POSITIONS, config.head_dim),
                self.dtype,
            )
        if self.places.largest_block >= shape[1]:
            raise ValueError(f"no block {self.places.largest_block} in a cache of {tuple(shape)}")
        structure = self.structure
        structure.layer_bytes = shape[1] * structure.block_bytes
        structure.keys, structure.values = pool.keys.data_ptr(), pool.values.data_ptr()
        self._pool = pool

    def _room_for(self, num_layers: int) -> _Choices:
        self._number = 0
        if self._choices is None or self._choices.num_layers < num_layers:
            self._choices = _Choices(num_layers, self.shape[0], self.config)
        return self._choices

    def _start_clocks(self, num_layers: int) -> int:
        """Give the call room to say when its phases end. Returns the time."""
        places = 2 * num_layers * _MOST_PHASES
        if self._is_timed and len(self._ended_ns) < places:
            self._ended_ns = array("q", bytes(8 * places))
            self.structure.ended_ns = self._ended_ns.buffer_info()[0]
        return time.monotonic_ns()

    def _phases(self, names: Sequence[str], half: int, began_ns: int) -> dict[str, float]:
        ends = self._ended_ns[half * _MOST_PHASES :][: len(names)]
        begins = (began_ns, *ends)
        return {name: (end - begin) * 1e-9 for name, begin, end in zip(names, begins, ends, strict=False)}

    def _check(self, code: int) -> None:
        if code:
            raise MemoryError(f"no memory for a layer of {self.shape[0]} rows")
