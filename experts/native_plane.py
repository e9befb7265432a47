"""The data plane's part of the C source in `native/`: its functions and structures, and a lock that both sides take.

Where the library is missing, or numbers are not little-endian, `plane` is None and Python does the same alone. Used by
`experts.channel`, `experts.desk` and `experts.exchange`.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Protocol

from experts.frame import DTYPE_CODES, MAGIC, VERSION, Agreement, Header, Kind, encode_header
from experts.native_products import library

logger = logging.getLogger(__name__)

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
FOREVER_NS = 2**63 - 1


@dataclass(frozen=True)
class Plane:
    """The library's functions of the data plane; the C source says what they do."""

    new_lock: Callable[..., int | None]
    take_lock: Callable[..., int]
    give_lock: Callable[..., int]
    free_lock: Callable[..., None]
    receive: Callable[..., int]
    """Of `experts.channel`."""
    serve: Callable[..., int]
    """Of `experts.desk`, as is what ends a call."""
    end_call: Callable[..., None]
    begin_work: Callable[..., None]
    end_work: Callable[..., None]


_TYPES: dict[str, tuple[Any, list[Any]]] = {
    "new_lock": (_POINTER, []),
    "take_lock": (_INT, [_POINTER, _INT]),
    "give_lock": (_INT, [_POINTER]),
    "free_lock": (None, [_POINTER]),
    "receive": (_INT64, [_POINTER, _POINTER, _INT64, _INT, _INT64]),
    "serve": (_INT, [_POINTER] * 4),
    "end_call": (None, [_POINTER]),
    "begin_work": (None, [_POINTER]),
    "end_work": (None, [_POINTER]),
}


@cache
def plane() -> Plane | None:
    """Loaded once; None where Python has to do alone."""
    found = library()
    if found is None or sys.byteorder != "little":
        return None
    functions = {}
    for name, (result, arguments) in _TYPES.items():
        function = getattr(found.loaded, f"sage_{name}", None)
        if function is None:
            logger.warning("native products are older than the data plane: install again")
            return None
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return Plane(**functions)


class SharedLock:
    """A lock that the C source takes as well, where there is one."""

    def __init__(self, functions: Plane) -> None:
        """Raises MemoryError."""
        address = functions.new_lock()
        if address is None:
            raise MemoryError("no memory for a lock")
        self.address = address
        self._take, self._give = functions.take_lock, functions.give_lock
        weakref.finalize(self, functions.free_lock, address).atexit = False

    def acquire(self, blocking: bool = True) -> bool:
        return self._take(self.address, blocking) == 0

    def release(self) -> None:
        self._give(self.address)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Lock(Protocol):
    """`SharedLock`, or `threading.Lock`."""

    def acquire(self, blocking: bool = True) -> bool: ...

    def release(self) -> None: ...

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def new_lock() -> tuple[Lock, int | None]:
    """A lock, and its address for the C source where there is one."""
    functions = plane()
    if functions is None:
        return threading.Lock(), None
    lock = SharedLock(functions)
    return lock, lock.address


class StreamStructure(ctypes.Structure):
    """`stream` of stream.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("sending", "ahead")),
        *((name, _INT64) for name in ("room", "taken", "filled", "fd", "tick_ns", "stall_ns")),
        *((name, _INT64) for name in ("spin_ns", "brief_spin_ns", "lost_core_ns", "most_doublings")),
        *((name, _INT64) for name in ("last_wait_ns", "num_fruitless", "waits_to_sleep")),
        *((name, _INT64) for name in ("receive_wait_ns", "heard_at_ns", "error")),
    ]


class AgreementStructure(ctypes.Structure):
    """`agreement` of frames.h."""

    _fields_ = [
        ("magic", ctypes.c_char * 4),
        *((name, ctypes.c_uint8) for name in ("version", "dtype_code", "unused_1", "unused_2")),
        *((name, ctypes.c_uint32) for name in ("width", "row_bytes", "max_rows", "num_components")),
        ("incarnation", ctypes.c_uint64),
        ("heartbeat", ctypes.c_uint8 * 64),
    ]

    @classmethod
    def of(cls, agreed: Agreement) -> AgreementStructure:
        heartbeat = encode_header(Header(Kind.HEARTBEAT, incarnation=agreed.incarnation))
        return cls(
            MAGIC,
            *(VERSION, DTYPE_CODES[agreed.dtype], 0, 0),
            *(agreed.width, agreed.row_bytes, agreed.max_rows, len(agreed.components)),
            agreed.incarnation,
            (ctypes.c_uint8 * 64).from_buffer_copy(heartbeat),
        )


class ErrandStructure(ctypes.Structure):
    """`errand` of exchange.h."""

    _fields_ = [
        *((name, _INT64) for name in ("state", "loss", "num_rows", "num_experts")),
        *((name, _INT64) for name in ("asked_ns", "deadline_ns", "waited_ns", "answered_ns")),
    ]


class Errand(Protocol):
    """What became of one share, as an `ErrandStructure` has it."""

    state: int
    loss: int
    num_rows: int
    num_experts: int
    asked_ns: int
    deadline_ns: int
    waited_ns: int
    answered_ns: int


class PeerStructure(ctypes.Structure):
    """`peer` of exchange.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("stream", "agreed")),
        ("component", _INT64),
        ("sequence", ctypes.c_uint64),
        ("usual_ns", _POINTER),
    ]


class ExchangeStructure(ctypes.Structure):
    """`exchange` of exchange.h."""

    _fields_ = [
        ("peers", _POINTER),
        ("num_peers", _INT64),
        ("trace", ctypes.c_char_p),
        *((name, _INT64) for name in ("trace_bytes", "silence_ns", "patience_ns")),
        *((name, _INT64) for name in ("longest_ns", "floor_ns", "expert_ns", "num_done")),
    ]
