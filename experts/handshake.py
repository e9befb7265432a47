"""How the two ends of a new connection prove to each other that they know the cluster's secret.

Four frames: HELLO (the router's nonce), CHALLENGE (the actor's nonce), PROOF, WELCOME (the actor's proof and what it
serves). A proof is an HMAC-SHA256 over role, protocol version, incarnation and both nonces, so that it is good for one
connection, one direction and one life of the actor. The secret never crosses, and a stranger learns nothing but a
random challenge. Does not encrypt, and does not protect what follows from somebody who sits on the path. Weight
servers and those who fetch from them do the same with roles of their own.
Used by `experts.connection`, `experts.server`, `experts.listener` and `experts.weight_client`.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch

from experts.channel import Channel, TransportLimits, expect_kind
from experts.errors import FrameFault, LinkLost
from experts.frame import DTYPE_CODES, VERSION, Agreement, ErrorCode, Header, Kind, check_exact, encode_header

MIN_SECRET_BYTES = 16
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_INFO_BYTES = 4096
ROUTER, ACTOR = b"router", b"actor"


class Roles(NamedTuple):
    """What both ends are to each other; part of every proof, so that one made for one protocol is none in another."""

    asker: bytes
    answerer: bytes


DATA_PLANE = Roles(ROUTER, ACTOR)

_DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_CODES}


@dataclass(frozen=True)
class ServiceInfo:
    """What an expert actor serves, as it announces to every router that connects."""

    width: int
    """Model width D of activations and rows."""
    dtype: torch.dtype
    numerics_class: str
    components: tuple[str, ...]


@dataclass(frozen=True)
class Stranger:
    """A peer that said HELLO and proved the secret, but is not welcomed yet."""

    incarnation: int
    """Of the actor that it means to talk to."""
    nonces: bytes


def check_secret(secret: bytes) -> None:
    """Raises ValueError when the secret is too short to be one."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"cluster secret of {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed")


def prove(secret: bytes, role: bytes, incarnation: int, nonces: bytes, info: bytes = b"") -> bytes:
    """The 32 bytes that only somebody who knows the secret can compute for this connection."""
    facts = struct.pack("<16s8sBQ", b"sage-moe experts", role, VERSION, incarnation)
    return hmac.digest(secret, facts + nonces + info, "sha256")


def introduce(
    channel: Channel, secret: bytes, incarnation: int, limits: TransportLimits, deadline_s: float
) -> tuple[ServiceInfo, Agreement]:
    """The router's side. Returns what the actor serves, and what both ends are held to.

    Raises LinkLost or FrameFault; the reason says what was refused.
    """
    info = prove_and_hear(channel, secret, incarnation, limits, deadline_s)
    return _decode_info(info, incarnation, limits)


def prove_and_hear(
    channel: Channel,
    secret: bytes,
    incarnation: int,
    limits: TransportLimits,
    deadline_s: float,
    roles: Roles = DATA_PLANE,
) -> bytes:
    """The asker's side of the handshake. Returns what the other one announces, unread. Raises like `introduce`."""
    own_nonce = secrets.token_bytes(NONCE_BYTES)
    _send(channel, Header(Kind.HELLO, incarnation=incarnation), own_nonce, deadline_s)
    peer_nonce = _receive(channel, Header(Kind.CHALLENGE), NONCE_BYTES, deadline_s)
    nonces = own_nonce + peer_nonce
    proof = prove(secret, roles.asker, incarnation, nonces)
    _send(channel, Header(Kind.PROOF, incarnation=incarnation), proof, deadline_s)
    try:
        header = channel.receive_header(deadline_s, limits.handshake_timeout_s)
    except LinkLost as loss:
        raise LinkLost(f"{loss} after our proof (is it the same secret?)", loss.is_orderly) from loss
    _check_welcome(header, incarnation)
    body = _receive_body(channel, header.body_bytes, deadline_s)
    proof, info = body[:PROOF_BYTES], body[PROOF_BYTES:]
    if not hmac.compare_digest(proof, prove(secret, roles.answerer, incarnation, nonces, info)):
        raise FrameFault("the actor does not know the secret")
    return info


def hear_out(channel: Channel, secret: bytes, deadline_s: float, roles: Roles = DATA_PLANE) -> Stranger:
    """The actor's side up to the router's proof. Raises LinkLost or FrameFault; the peer is then told nothing."""
    header = channel.receive_header(deadline_s, math.inf)
    expect_kind(header, Kind.HELLO)
    hello = Header(Kind.HELLO, incarnation=header.incarnation)
    peer_nonce = _receive_rest(channel, header, hello, NONCE_BYTES, deadline_s)
    own_nonce = secrets.token_bytes(NONCE_BYTES)
    _send(channel, Header(Kind.CHALLENGE), own_nonce, deadline_s)
    expected = Header(Kind.PROOF, incarnation=header.incarnation)
    proof = _receive(channel, expected, PROOF_BYTES, deadline_s)
    nonces = peer_nonce + own_nonce
    if not hmac.compare_digest(proof, prove(secret, roles.asker, header.incarnation, nonces)):
        raise FrameFault("wrong proof of the cluster secret")
    return Stranger(header.incarnation, nonces)


def welcome(
    channel: Channel,
    secret: bytes,
    stranger: Stranger,
    info: bytes,
    deadline_s: float,
    roles: Roles = DATA_PLANE,
) -> None:
    """End the actor's side: prove the secret in turn and announce the service. info: from `encode_info`."""
    proof = prove(secret, roles.answerer, stranger.incarnation, stranger.nonces, info)
    _send(channel, Header(Kind.WELCOME, incarnation=stranger.incarnation), proof + info, deadline_s)


def refuse(channel: Channel, code: ErrorCode, deadline_s: float) -> None:
    """Tell a peer that proved the secret why it is not welcome."""
    _send(channel, Header(Kind.ERROR, error_code=code), b"", deadline_s)


def _check_welcome(header: Header, incarnation: int) -> None:
    if header.kind == Kind.ERROR and header.error_code == ErrorCode.WRONG_INCARNATION:
        raise FrameFault(f"the actor there is another incarnation than {incarnation}")
    if header.kind == Kind.ERROR and header.error_code == ErrorCode.BUSY:
        raise FrameFault("the actor has as many connections as it takes")
    if not PROOF_BYTES < header.body_bytes <= PROOF_BYTES + MAX_INFO_BYTES:
        raise FrameFault(f"welcome of {header.body_bytes} bytes")
    check_exact(header, Header(Kind.WELCOME, incarnation=incarnation, body_bytes=header.body_bytes))


def _send(channel: Channel, header: Header, body: bytes, deadline_s: float) -> None:
    channel.send(encode_header(header._replace(body_bytes=len(body))) + body, deadline_s=deadline_s)


def _receive(channel: Channel, expected: Header, body_bytes: int, deadline_s: float) -> bytes:
    header = channel.receive_header(deadline_s, math.inf)
    return _receive_rest(channel, header, expected, body_bytes, deadline_s)


def _receive_rest(
    channel: Channel, header: Header, expected: Header, body_bytes: int, deadline_s: float
) -> bytes:
    check_exact(header, expected._replace(body_bytes=body_bytes))
    return _receive_body(channel, body_bytes, deadline_s)


def _receive_body(channel: Channel, body_bytes: int, deadline_s: float) -> bytes:
    body = bytearray(body_bytes)
    channel.receive_body(memoryview(body), deadline_s=deadline_s, silence_s=math.inf)
    return bytes(body)


def encode_info(info: ServiceInfo, max_rows: int) -> bytes:
    """What a welcome announces. Raises ValueError when it says too much for one."""
    facts = {
        "width": info.width,
        "dtype": str(info.dtype).removeprefix("torch."),
        "numerics_class": info.numerics_class,
        "components": list(info.components),
        "max_rows": max_rows,
    }
    body = json.dumps(facts).encode()
    if len(body) > MAX_INFO_BYTES:
        raise ValueError(f"description of the service of {len(body)} bytes, at most {MAX_INFO_BYTES}")
    return body


def _decode_info(body: bytes, incarnation: int, limits: TransportLimits) -> tuple[ServiceInfo, Agreement]:
    """Raises FrameFault; the sender has proved the secret, but it may still be another version of this program."""
    try:
        facts = json.loads(body)
        width, max_rows = facts["width"], facts["max_rows"]
        dtype, numerics_class = _DTYPES_BY_NAME[facts["dtype"]], facts["numerics_class"]
        components = facts["components"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FrameFault("welcome without a usable description of the service") from error
    if not (_is_count(width, limits.max_width) and _is_count(max_rows, 2**32 - 1)):
        raise FrameFault(f"welcome with width {width!r} and at most {max_rows!r} rows")
    if not isinstance(components, list) or not components:
        raise FrameFault("welcome without components")
    if not all(isinstance(name, str) for name in (*components, numerics_class)):
        raise FrameFault("welcome with components or a numerics class that are no names")
    info = ServiceInfo(width, dtype, numerics_class, tuple(components))
    try:
        max_rows = min(max_rows, limits.max_rows_per_frame)
        return info, Agreement(incarnation, width, dtype, info.components, max_rows)
    except ValueError as error:
        raise FrameFault(f"welcome with what a frame cannot hold: {error}") from error


def _is_count(value: object, highest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= highest
