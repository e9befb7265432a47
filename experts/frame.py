"""The data plane's wire format, version 1: one frame's header and body, and what a frame is checked for.

Pure: bytes in, values out, no sockets. docs/wire-format.md describes the same for other programs. Every check of a
header comes before memory is taken for its body. Does not promise secrecy or integrity beyond TCP's own.
Used by `experts.handshake`, `experts.channel`, `experts.connection` and `experts.server`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from operator import lt
from typing import NamedTuple

import torch

from experts.call import ExpertCall
from experts.errors import FrameFault

MAGIC = b"SAGE"
VERSION = 1
MAX_TRACE_BYTES = 64
MAX_ERROR_BYTES = 512
MAX_DEADLINE_US = 2**32 - 1
MAX_BODY_BYTES = 2**32 - 1

DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

_HEADER = struct.Struct("<4sBBBBHHIQQIIIIIIQ")
HEADER_BYTES = _HEADER.size
assert HEADER_BYTES == 64


class Kind(IntEnum):
    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    CALL = 5
    ROWS = 6
    ERROR = 7
    HEARTBEAT = 8
    GOODBYE = 9


class ErrorCode(IntEnum):
    INTERNAL = 1
    EXPERT = 2
    """The actor's expert code refused or failed; the message says how."""
    NOT_IN_GROUP = 3
    BUDGET_TOO_SMALL = 4
    WRONG_INCARNATION = 5
    """Only in the handshake, as is BUSY."""
    BUSY = 6


class Header(NamedTuple):
    """The 64 bytes in front of every body, less magic, version and the reserved field."""

    kind: int
    dtype_code: int = 0
    trace_bytes: int = 0
    component: int = 0
    """Index into the components that the actor announced."""
    error_code: int = 0
    layer: int = 0
    incarnation: int = 0
    sequence: int = 0
    """Counts the calls of one connection from 1; an answer carries its call's."""
    deadline_us: int = 0
    """Time left for the answer when the call was sent."""
    num_tokens: int = 0
    num_rows: int = 0
    num_experts: int = 0
    width: int = 0
    body_bytes: int = 0


@dataclass(frozen=True)
class Agreement:
    """What both ends of a connection hold each other to after the handshake."""

    incarnation: int
    width: int
    """Model width D."""
    dtype: torch.dtype
    components: tuple[str, ...]
    max_rows: int
    """Of one frame; bounds output rows and token rows alike."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_CODES:
            raise ValueError(f"{self.dtype} is not one of {sorted(map(str, DTYPE_CODES))}")
        if self.max_map_bytes + self.max_rows * self.row_bytes > MAX_BODY_BYTES:
            raise ValueError(f"{self.max_rows} rows of {self.row_bytes} bytes are too many for one frame")

    @cached_property
    def dtype_code(self) -> int:
        return DTYPE_CODES[self.dtype]

    @cached_property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @cached_property
    def max_map_bytes(self) -> int:
        """Of a call's body before its activations: at most as many experts as rows."""
        return 12 * self.max_rows + MAX_TRACE_BYTES


def encode_header(header: Header) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, *header, 0)


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Raises FrameFault unless the 64 bytes begin a frame of this version."""
    magic, version, *fields, reserved = _HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameFault("not a frame of this protocol")
    if version != VERSION:
        raise FrameFault(f"frame of version {version}, this side speaks {VERSION}")
    if reserved != 0:
        raise FrameFault("reserved field is not zero")
    return Header._make(fields)


def check_exact(header: Header, expected: Header) -> None:
    """Raises FrameFault naming the first field that differs."""
    if header == expected:
        return
    for name, value, wanted in zip(Header._fields, header, expected, strict=True):
        if value != wanted:
            raise FrameFault(f"{name} is {value} instead of {wanted}")


def encode_call(call: ExpertCall, agreed: Agreement, sequence: int, deadline_us: int) -> bytes:
    """Header, experts, counts, row map and trace of a call; the activations follow it on the wire.

    Raises ValueError when the call's fields disagree with each other or with the agreement.
    """
    (num_tokens, width), num_rows = call.tokens_TD.shape, len(call.token_of_R)
    trace = call.request_id.encode("ascii")
    if width != agreed.width or call.tokens_TD.dtype != agreed.dtype:
        raise ValueError(
            f"activations of width {width} in {call.tokens_TD.dtype}, agreed were {agreed.width} in {agreed.dtype}"
        )
    if call.component not in agreed.components:
        raise ValueError(f"component {call.component!r} is not one of {agreed.components}")
    try:
        _check_maps(call.experts, call.counts, call.token_of_R, num_tokens)
        _check_trace(trace)
    except FrameFault as fault:
        raise ValueError(f"not a valid call: {fault}") from fault
    num_maps = 2 * len(call.experts) + num_rows
    try:
        return _HEADER.pack(
            *(MAGIC, VERSION, Kind.CALL, agreed.dtype_code, len(trace)),
            *(agreed.components.index(call.component), 0, call.layer, agreed.incarnation, sequence),
            *(min(deadline_us, MAX_DEADLINE_US), num_tokens, num_rows, len(call.experts), width),
            *(4 * num_maps + len(trace) + num_tokens * agreed.row_bytes, 0),
        ) + struct.pack(f"<{num_maps}I{len(trace)}s", *call.experts, *call.counts, *call.token_of_R, trace)
    except struct.error as error:
        raise ValueError(f"a field of the call does not fit its place in the frame: {error}") from error


def map_bytes(header: Header) -> int:
    """Length of a call's body before its activations."""
    return 4 * (2 * header.num_experts + header.num_rows) + header.trace_bytes


def check_call(header: Header, agreed: Agreement, sequence: int) -> None:
    """Raises FrameFault unless this header may begin call number `sequence`; nothing is allocated before."""
    if not (1 <= header.num_rows <= agreed.max_rows and 1 <= header.num_tokens <= agreed.max_rows):
        raise FrameFault(
            f"{header.num_tokens} tokens, {header.num_rows} rows; allowed are 1 to {agreed.max_rows}"
        )
    if not 1 <= header.num_experts <= header.num_rows:
        raise FrameFault(f"{header.num_experts} experts for {header.num_rows} rows")
    if header.component >= len(agreed.components):
        raise FrameFault(f"component {header.component} of {len(agreed.components)}")
    if header.trace_bytes > MAX_TRACE_BYTES:
        raise FrameFault(f"trace id of {header.trace_bytes} bytes, at most {MAX_TRACE_BYTES}")
    if header.deadline_us == 0:
        raise FrameFault("call without a deadline")
    expected = Header(  # rather than _replace, which takes three times as long
        Kind.CALL,
        agreed.dtype_code,
        header.trace_bytes,
        header.component,
        0,
        header.layer,
        agreed.incarnation,
        sequence,
        header.deadline_us,
        header.num_tokens,
        header.num_rows,
        header.num_experts,
        agreed.width,
        map_bytes(header) + header.num_tokens * agreed.row_bytes,
    )
    check_exact(header, expected)


def decode_call(header: Header, maps: memoryview, agreed: Agreement, tokens_TD: torch.Tensor) -> ExpertCall:
    """Build the call from a checked header and the `map_bytes(header)` bytes behind it.

    Raises FrameFault when experts, counts, row map or trace id are not what a call may hold.
    """
    num_experts, num_maps = header.num_experts, 2 * header.num_experts + header.num_rows
    numbers = struct.unpack_from(f"<{num_maps}I", maps)
    trace = bytes(maps[4 * num_maps :])
    experts, counts = numbers[:num_experts], numbers[num_experts : 2 * num_experts]
    token_of_R = numbers[2 * num_experts :]
    _check_maps(experts, counts, token_of_R, header.num_tokens)
    _check_trace(trace)
    component = agreed.components[header.component]
    return ExpertCall(component, header.layer, experts, counts, token_of_R, tokens_TD, trace.decode("ascii"))


def rows_header(agreed: Agreement, sequence: int, num_rows: int) -> Header:
    """The only header that may begin the answer to a call of `num_rows` rows."""
    return Header(  # by position, which takes half the time
        *(Kind.ROWS, agreed.dtype_code, 0, 0, 0, 0, agreed.incarnation, sequence, 0, 0, num_rows, 0),
        *(agreed.width, num_rows * agreed.row_bytes),
    )


def encode_error(agreed: Agreement, sequence: int, code: int, message: str) -> bytes:
    """A whole ERROR frame; the message is cut to 512 bytes."""
    body = message.encode("utf-8", "replace")[:MAX_ERROR_BYTES]
    header = Header(
        Kind.ERROR,
        error_code=code,
        incarnation=agreed.incarnation,
        sequence=sequence,
        body_bytes=len(body),
    )
    return encode_header(header) + body


def check_error(header: Header, agreed: Agreement, sequence: int) -> None:
    """Raises FrameFault unless this header may begin the error answer to call number `sequence`."""
    if header.error_code == 0:
        raise FrameFault("error answer without a code")
    if header.body_bytes > MAX_ERROR_BYTES:
        raise FrameFault(f"error message of {header.body_bytes} bytes, at most {MAX_ERROR_BYTES}")
    expected = Header(
        Kind.ERROR,
        error_code=header.error_code,
        incarnation=agreed.incarnation,
        sequence=sequence,
        body_bytes=header.body_bytes,
    )
    check_exact(header, expected)


def split_by_rows(call: ExpertCall, max_rows: int) -> list[ExpertCall]:
    """Cut a call, in row order, into calls of at most `max_rows` rows and tokens.

    The parts' rows, put one after another, are the whole call's rows. Parts carry only the tokens that they need.
    Raises ValueError when the fields of a call that must be cut disagree; others are left to `encode_call`.
    """
    num_rows = call.num_rows
    if num_rows == 0 or (num_rows <= max_rows and call.tokens_TD.shape[0] <= max_rows):
        return [call]
    call.validate()
    return [_cut(call, first, min(first + max_rows, num_rows)) for first in range(0, num_rows, max_rows)]


def _cut(call: ExpertCall, first: int, last: int) -> ExpertCall:
    experts, counts = [], []
    start = 0
    for expert, count in zip(call.experts, call.counts, strict=True):
        covered = min(start + count, last) - max(start, first)
        if covered > 0:
            experts.append(expert)
            counts.append(covered)
        start += count
    token_of_R = call.token_of_R[first:last]
    tokens = sorted(set(token_of_R))
    place = {token: index for index, token in enumerate(tokens)}
    return call._replace(
        experts=tuple(experts),
        counts=tuple(counts),
        token_of_R=tuple(place[token] for token in token_of_R),
        tokens_TD=call.tokens_TD.index_select(0, torch.tensor(tokens, device=call.tokens_TD.device)),
    )


def _check_maps(
    experts: tuple[int, ...], counts: tuple[int, ...], token_of_R: tuple[int, ...], num_tokens: int
) -> None:
    if len(experts) != len(counts):
        raise FrameFault(f"{len(experts)} experts but {len(counts)} counts")
    if not all(map(lt, experts, experts[1:])):
        raise FrameFault("experts are not distinct and ascending")
    if not counts or min(counts) < 1 or sum(counts) != len(token_of_R):
        raise FrameFault(f"counts of {len(counts)} experts do not cover {len(token_of_R)} rows")
    if max(token_of_R) >= num_tokens:
        raise FrameFault(f"row map reaches token {max(token_of_R)} of {num_tokens}")


def _check_trace(trace: bytes) -> None:
    """Printable ASCII only, since trace ids go to logs."""
    if len(trace) > MAX_TRACE_BYTES:
        raise FrameFault(f"trace id of {len(trace)} bytes, at most {MAX_TRACE_BYTES}")
    if not trace.isascii() or not trace.decode("ascii").isprintable():
        raise FrameFault("trace id holds bytes that are not printable ASCII")
