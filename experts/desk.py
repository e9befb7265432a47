"""Where the C source finds a worker's experts, and computes calls for them as they come over a socket.

What is at hand lies on shelves, one a layer, that the worker keeps; who was used is written down and counted by the
worker later, in the same order and before anything is decided by it. `native/serve.c` goes from one frame to the next
without Python and comes back for everything else. Made by `experts.worker`, used by `experts.server`.
"""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple

import torch

from experts.call import ExpertCall
from experts.channel import Channel
from experts.errors import LinkLost
from experts.ffn import ExpertWeights
from experts.frame import HEADER_BYTES, Agreement, Header, decode_call, decode_header, map_bytes
from experts.native_plane import AgreementStructure, Plane, SharedLock, plane
from experts.native_products import DTYPES, LEVELS, GatedMatrices, library_for
from experts.numerics import RowKernel
from extraction.manifest import ExpertKey

USES_ROOM = 1 << 16
"""Numbers; a call writes down three and those of its experts."""
_INT64, _POINTER = ctypes.c_int64, ctypes.c_void_p
EXPERT_BYTES = 32
"""Of four addresses."""


class _Shelf(ctypes.Structure):
    """`shelf` of serve.c."""

    _fields_ = [("forms", _INT64 * 8), ("experts", _POINTER), ("num_experts", _INT64)]


class _DeskStructure(ctypes.Structure):
    """`desk` of serve.c."""

    _fields_ = [
        ("lock", _POINTER),
        *((name, _INT64) for name in ("level", "is_narrow", "num_layers")),
        *((name, _POINTER) for name in ("shelves", "uses")),
        *((name, _INT64) for name in ("num_uses", "most_uses")),
        ("counting", _POINTER),
        *((name, _INT64) for name in ("num_active", "busy_ns", "busy_since_ns")),
        ("run", _POINTER),
        ("threads", _INT64),
    ]


class _Service(ctypes.Structure):
    """`service` of serve.c."""

    _fields_ = [
        ("sequence", ctypes.c_uint64),
        *((name, _INT64) for name in ("silence_ns", "deadline_ns")),
        ("call", _POINTER),
        *((name, _INT64) for name in ("tokens_at", "loss")),
    ]


class _Turn(IntEnum):
    """`turn` of serve.c: why it is Python's turn."""

    NOTHING_CAME = 1
    LOST = 2
    OTHER_FRAME = 3
    CALL_FOR_PYTHON = 4
    OVERDUE = 5


class Use(NamedTuple):
    """One call that was computed at the desk."""

    layer: tuple[str, int]
    experts: tuple[int, ...]
    num_rows: int


class ServedCall(NamedTuple):
    """One that is left to Python."""

    call: ExpertCall
    sequence: int
    deadline_s: float


class BusyClock:
    """For how long there was work, without a desk. Any thread may call."""

    def __init__(self) -> None:
        self.num_active = 0
        """Pieces of work that have begun and not ended."""
        self.busy_s = 0.0
        self._since_s = 0.0
        self._counting = threading.Lock()

    def begin_work(self) -> None:
        with self._counting:
            if self.num_active == 0:
                self._since_s = time.perf_counter()
            self.num_active += 1

    def end_work(self) -> None:
        with self._counting:
            self.num_active -= 1
            if self.num_active == 0:
                self.busy_s += time.perf_counter() - self._since_s


class Desk:
    """Of one worker, for all connections of its actor. `lock` is the worker's own."""

    def __init__(
        self, functions: Plane, level: str, dtype: torch.dtype, width: int, keys: Iterable[ExpertKey]
    ) -> None:
        """Use `of`. keys: all experts that may ever be at hand."""
        self._plane = functions
        found = library_for(level)
        self.dtype, self.width = dtype, width
        self.lock, self._counting = SharedLock(functions), SharedLock(functions)
        most: dict[tuple[str, int], int] = {}
        for key in keys:
            layer = key.component, key.layer
            most[layer] = max(most.get(layer, 0), key.expert + 1)
        self.components = tuple(sorted({component for component, _ in most}))
        """As frames number them."""
        self._num_layers = 1 + max((layer for _, layer in most), default=-1)
        self._experts = {layer: array("Q", bytes(EXPERT_BYTES * count)) for layer, count in most.items()}
        self._shelves = (_Shelf * (len(self.components) * self._num_layers))()
        self._number_of = {
            layer: self.components.index(layer[0]) * self._num_layers + layer[1] for layer in most
        }
        self._layer_of = {number: layer for layer, number in self._number_of.items()}
        for layer, room in self._experts.items():
            shelf = self._shelves[self._number_of[layer]]
            shelf.experts, shelf.num_experts = room.buffer_info()[0], most[layer]
        self._is_closed = False
        self._forms: dict[tuple[str, int], tuple[int, ...]] = {}
        self._uses = array("I", bytes(4 * USES_ROOM))
        self._structure = _DeskStructure(
            *(self.lock.address, LEVELS.index(level), dtype == torch.bfloat16, self._num_layers),
            *(ctypes.addressof(self._shelves), self._uses.buffer_info()[0], 0, USES_ROOM),
            *(self._counting.address, 0, 0, 0, found.run_in_threads, torch.get_num_threads()),
        )
        self._address = ctypes.addressof(self._structure)

    @classmethod
    def of(
        cls, kernel: RowKernel, dtype: torch.dtype, widths: Mapping[str, int], keys: Iterable[ExpertKey]
    ) -> Desk | None:
        """None where our own products do not compute these experts, or there is no C source. widths: of all
        components, which must have one in common, as a connection has."""
        functions = plane()
        if (
            functions is None
            or kernel.product != "native"
            or dtype not in DTYPES
            or len({*widths.values()}) != 1
        ):
            return None
        return cls(functions, kernel.level, dtype, next(iter(widths.values())), keys)

    def show(self, key: ExpertKey, weights: ExpertWeights | None) -> None:
        """Put an expert on its shelf, or take it away before its memory is used for another. Under the lock."""
        if self._is_closed:
            return
        layer = key.component, key.layer
        native = None if weights is None else weights.native
        addresses = (
            native.addresses if native is not None and self._fits(layer, native) else bytes(EXPERT_BYTES)
        )
        place = self._experts[layer].buffer_info()[0] + EXPERT_BYTES * key.expert
        ctypes.memmove(place, addresses, EXPERT_BYTES)

    def _fits(self, layer: tuple[str, int], expert: GatedMatrices) -> bool:
        """Whether it can be in a call with the others of its layer, and with the desk's rows."""
        gate_up, down = expert.matrices
        stored = gate_up.weights.dtype
        is_wrong = stored.is_floating_point and stored != self.dtype
        if is_wrong or (gate_up.inputs, down.outputs) != (self.width, self.width):
            return False
        if layer not in self._forms:
            self._forms[layer] = expert.forms
            self._shelves[self._number_of[layer]].forms[:] = expert.forms
        return self._forms[layer] is expert.forms

    def close(self) -> None:
        """Leave all calls to Python from now on. Under the lock."""
        self._is_closed = True
        for room in self._experts.values():
            ctypes.memset(room.buffer_info()[0], 0, EXPERT_BYTES * (len(room) // 4))

    def take_uses(self) -> Iterator[Use]:
        """What was computed and not told yet, in its order. Under the lock, until the last one is taken."""
        numbers, used, at = self._uses, self._structure.num_uses, 0
        while at < used:
            shelf, num_rows, num_experts = numbers[at : at + 3]
            yield Use(self._layer_of[shelf], tuple(numbers[at + 3 : at + 3 + num_experts]), num_rows)
            at += 3 + num_experts
        self._structure.num_uses = 0

    @property
    def num_active(self) -> int:
        """See `BusyClock`."""
        return self._structure.num_active  # type: ignore[no-any-return]

    @property
    def busy_s(self) -> float:
        """See `BusyClock`."""
        return self._structure.busy_ns * 1e-9  # type: ignore[no-any-return]

    def begin_work(self) -> None:
        """See `BusyClock`."""
        self._plane.begin_work(self._address)

    def end_work(self) -> None:
        """See `BusyClock`."""
        self._plane.end_work(self._address)

    def attend(self, channel: Channel, agreed: Agreement, silence_s: float) -> Attendance:
        """To one connection. silence_s: how long a peer may pause in the middle of a frame."""
        return Attendance(self._plane, self._address, channel, agreed, silence_s)


class Attendance:
    """A desk's to one connection; for the thread that reads."""

    def __init__(
        self, functions: Plane, desk_address: int, channel: Channel, agreed: Agreement, silence_s: float
    ) -> None:
        """Use `Desk.attend`."""
        self._plane, self._channel, self._agreed = functions, channel, agreed
        self._service = _Service(0, round(silence_s * 1e9), 0, None, 0, 0)
        self._agreement = AgreementStructure.of(agreed)
        self._addresses = (
            *(channel.address, desk_address),
            *(ctypes.addressof(self._agreement), ctypes.addressof(self._service)),
        )

    @property
    def sequence(self) -> int:
        """Of the last call."""
        return self._service.sequence  # type: ignore[no-any-return]

    def serve(self) -> Header | ServedCall | None:
        """Answer calls until there is something else: the header of another frame, a call that is not computed here, or
        None where nothing has come for a while. Raises LinkLost, FrameFault."""
        service = self._service
        turn = self._plane.serve(*self._addresses)
        if turn == _Turn.CALL_FOR_PYTHON:
            try:
                return self._take_call()
            finally:
                self._plane.end_call(service.call)
        if turn == _Turn.LOST:
            raise self._channel.loss(service.loss)
        if turn == _Turn.OVERDUE:
            raise LinkLost("a call was not done by its deadline")
        return self._channel.poll_header() if turn == _Turn.OTHER_FRAME else None

    def _take_call(self) -> ServedCall:
        service, agreed = self._service, self._agreed
        header = decode_header(ctypes.string_at(service.call, HEADER_BYTES))
        maps = ctypes.string_at(service.call + HEADER_BYTES, map_bytes(header))
        tokens_TD = torch.empty(header.num_tokens, agreed.width, dtype=agreed.dtype)
        ctypes.memmove(tokens_TD.data_ptr(), service.call + service.tokens_at, tokens_TD.nbytes)
        call = decode_call(header, memoryview(maps), agreed, tokens_TD)
        return ServedCall(call, service.sequence, service.deadline_ns * 1e-9)
