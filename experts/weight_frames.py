"""What fetcher and weight server say to each other after the handshake: questions, and answers in bounded parts. Pure.

Frames have the data plane's header (`experts.frame`) with kinds of their own. A question names a file of the store's
description or an expert; nothing that a fetcher sends is ever opened as a path. Every
answer's length is known before it comes, from the announcement, the manifest or the index, so that each frame has
exactly one allowed header and an answer cannot go on for ever. Used by `experts.weight_server` and
`experts.weight_client`; docs/weights.md describes it.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from enum import IntEnum

from experts.channel import TransportLimits
from experts.errors import FrameFault
from experts.frame import MAX_ERROR_BYTES, Header, Kind, check_exact, encode_header
from experts.handshake import Roles
from extraction.manifest import MAX_MANIFEST_BYTES, NAME_PATTERN, SHA256_PATTERN, ExpertKey

WEIGHT_ROLES = Roles(b"fetcher", b"weights")
"""A proof for the data plane is none here, and the other way round."""
PART_BYTES = 1 << 20
"""Most bytes of an answer in one frame."""
MAX_QUESTION_BYTES = 4096
DIGEST_BYTES = 32
WEIGHT_LIMITS = TransportLimits(heartbeat_interval_s=1.0, heartbeat_misses=10, idle_timeout_s=60.0)
"""No heartbeats: between two questions nobody waits, and within an answer ten seconds without a byte end it."""
PART_TIMEOUT_S = 60.0
"""For one part to leave or to come, which asks for 17 KiB/s."""
_KEY = struct.Struct("<II")


class WeightKind(IntEnum):
    """Frames beside those of the handshake and `Kind.ERROR`."""

    ASK_MANIFEST = 32
    ASK_FILE = 33
    """One of the store's small files; the body is its name in the manifest."""
    ASK_EXPERT = 34
    """The body is layer, expert and component."""
    PART = 35
    """`num_rows` counts an answer's parts from 0."""
    END = 36
    """The body is the SHA-256 of the whole answer."""


class WeightFault(IntEnum):
    """Error codes, beside `ErrorCode.BUSY` in the handshake."""

    NOT_HELD = 16
    """This server does not have it; another may."""
    UNREADABLE = 17
    """It should be there and cannot be read, or has another hash than it should."""


@dataclass(frozen=True)
class Announcement:
    """What a weight server says of itself in its welcome."""

    store_hash: str
    manifest_bytes: int


def encode_announcement(announcement: Announcement) -> bytes:
    facts = {"store": announcement.store_hash, "manifest_bytes": announcement.manifest_bytes}
    return json.dumps(facts).encode()


def decode_announcement(body: bytes) -> Announcement:
    """Raises FrameFault."""
    try:
        facts = json.loads(body)
        store_hash, manifest_bytes = facts["store"], facts["manifest_bytes"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FrameFault("welcome without a usable description of a store") from error
    if not isinstance(store_hash, str) or not re.fullmatch(SHA256_PATTERN, store_hash):
        raise FrameFault("welcome with a store's hash that is none")
    if isinstance(manifest_bytes, bool) or not isinstance(manifest_bytes, int):
        raise FrameFault("welcome with a manifest of no size")
    if not 0 < manifest_bytes <= MAX_MANIFEST_BYTES:
        raise FrameFault(f"welcome with a manifest of {manifest_bytes} bytes, at most {MAX_MANIFEST_BYTES}")
    return Announcement(store_hash, manifest_bytes)


def encode_question(kind: WeightKind, sequence: int, body: bytes = b"") -> bytes:
    """A whole frame. Raises ValueError for a body that no server reads."""
    if len(body) > MAX_QUESTION_BYTES:
        raise ValueError(f"question of {len(body)} bytes, at most {MAX_QUESTION_BYTES}")
    return encode_header(Header(kind, sequence=sequence, body_bytes=len(body))) + body


def check_question(header: Header, sequence: int) -> WeightKind:
    """Raises FrameFault unless this header may begin question number `sequence`; nothing is allocated before."""
    if not WeightKind.ASK_MANIFEST <= header.kind <= WeightKind.ASK_EXPERT:
        raise FrameFault(f"frame of kind {header.kind} instead of a question")
    if header.body_bytes > MAX_QUESTION_BYTES:
        raise FrameFault(f"question of {header.body_bytes} bytes, at most {MAX_QUESTION_BYTES}")
    check_exact(header, Header(header.kind, sequence=sequence, body_bytes=header.body_bytes))
    return WeightKind(header.kind)


def encode_key(key: ExpertKey) -> bytes:
    return _KEY.pack(key.layer, key.expert) + key.component.encode()


def decode_key(body: bytes) -> ExpertKey:
    """Raises FrameFault."""
    component = body[_KEY.size :].decode("ascii", "replace")
    if len(body) < _KEY.size or not re.fullmatch(NAME_PATTERN, component):
        raise FrameFault("question for an expert that can have no such name")
    return ExpertKey(component, *_KEY.unpack_from(body))


def part_header(sequence: int, number: int, total_bytes: int) -> Header:
    """The only header that may begin part `number` of an answer of `total_bytes`."""
    nbytes = min(PART_BYTES, total_bytes - number * PART_BYTES)
    return Header(WeightKind.PART, sequence=sequence, num_rows=number, body_bytes=nbytes)


def num_parts(total_bytes: int) -> int:
    return -(-total_bytes // PART_BYTES)


def end_header(sequence: int) -> Header:
    """The only header that may end an answer."""
    return Header(WeightKind.END, sequence=sequence, body_bytes=DIGEST_BYTES)


def check_refusal(header: Header, sequence: int) -> None:
    """Raises FrameFault unless this header may begin the refusal of question number `sequence`."""
    if header.error_code == 0:
        raise FrameFault("error answer without a code")
    if header.body_bytes > MAX_ERROR_BYTES:
        raise FrameFault(f"error message of {header.body_bytes} bytes, at most {MAX_ERROR_BYTES}")
    expected = Header(
        Kind.ERROR, error_code=header.error_code, sequence=sequence, body_bytes=header.body_bytes
    )
    check_exact(header, expected)
