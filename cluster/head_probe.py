"""Asks a cluster's head, before anything joins it: is it there, who may speak to it, which versions does it run?

Speaks Ray's own protocol (gRPC) directly, so that it needs no running Ray here, ends in time whatever answers, and
can ask without a token, which tells whether the cluster lets strangers in. Called by `cluster.joining`,
`sage-moe join` and `sage-moe doctor`.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import grpc

from cluster.errors import HeadAddressInvalid
from cluster.ray_token import Token

TIMEOUT_S = 5.0
DEFAULT_PORT = 6379
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
READ_VALUE = "/ray.rpc.InternalKVGcsService/InternalKVGet"
VERSIONS_KEY, VERSIONS_NAMESPACE = b"CLUSTER_METADATA", b"cluster"
OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 1 << 20))


class Answer(Enum):
    """What a head says to one call."""

    TAKEN = "taken"
    REFUSED = "refused"
    """The call had no token, or a wrong one."""
    OTHER = "other"
    """Something listens there that is no head of a Ray cluster."""
    NONE = "none"


@dataclass(frozen=True)
class HeadFacts:
    """One head, as it looks from this machine."""

    address: str
    without_token: Answer
    with_token: Answer | None = None
    """None where there is no token to try."""
    reason: str = ""
    """Why nothing answers."""
    ray_version: str = ""
    python_version: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it takes calls, which are commands to run, from everybody who reaches it."""
        return self.without_token is Answer.TAKEN


def parse_head(text: str) -> str:
    """HOST or HOST:PORT as `host:port`. Raises HeadAddressInvalid."""
    text = text.strip()
    host, separator, port = text.rpartition(":")
    is_bare = not separator or text.endswith("]") or (":" in host and not host.startswith("["))
    if is_bare:
        host, port = text, str(DEFAULT_PORT)
    host = host.strip("[]")
    is_number = port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
    if not host or not is_number or not all("!" <= character <= "~" for character in host) or "/" in host:
        raise HeadAddressInvalid(text)
    return join_host_port(host, int(port))


def join_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """Of what `parse_head` returns."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def probe_head(address: str, token: Token | None, timeout_s: float = TIMEOUT_S) -> HeadFacts:
    """Ask once without a token and once with it; each question ends within `timeout_s`."""
    reason = _why_unreachable(address, timeout_s)
    if reason:
        return HeadFacts(address, Answer.NONE, reason=reason)
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        answer, _, reason = _call(channel, CHECK_ALIVE, b"", None, timeout_s)
        if answer in (Answer.NONE, Answer.OTHER):
            return HeadFacts(address, answer, reason=reason)
        if token is None:
            known = _versions(channel, None, timeout_s) if answer is Answer.TAKEN else ("", "")
            return HeadFacts(address, answer, None, "", *known)
        with_token, _, _ = _call(channel, CHECK_ALIVE, b"", token, timeout_s)
        known = _versions(channel, token, timeout_s) if with_token is Answer.TAKEN else ("", "")
        return HeadFacts(address, answer, with_token, "", *known)


def _why_unreachable(address: str, timeout_s: float) -> str:
    """Empty where a connection stands. gRPC would tell less."""
    try:
        socket.create_connection(split_host_port(address), timeout=timeout_s).close()
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def _call(
    channel: grpc.Channel, method: str, request: bytes, token: Token | None, timeout_s: float
) -> tuple[Answer, bytes, str]:
    """The answer, its bytes where there are any, and why there is none."""
    metadata = () if token is None else (("authorization", f"Bearer {token.value}"),)
    try:
        reply = channel.unary_unary(method)(request, timeout=timeout_s, metadata=metadata)
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return Answer.REFUSED, b"", ""
        if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return Answer.NONE, b"", f"it takes connections and does not answer within {timeout_s:g} s"
        return Answer.OTHER, b"", "what answers there is no head of a Ray cluster"
    return Answer.TAKEN, bytes(reply), ""


def _versions(channel: grpc.Channel, token: Token | None, timeout_s: float) -> tuple[str, str]:
    """Of Ray and Python at the head; empty where it does not tell."""
    _, reply, _ = _call(channel, READ_VALUE, encode_key(), token, timeout_s)
    return read_versions(reply)


def encode_key() -> bytes:
    """Ray's InternalKVGetRequest: field 1 is the key, field 2 the namespace, each with its length."""
    fields = ((1, VERSIONS_KEY), (2, VERSIONS_NAMESPACE))
    return b"".join(bytes((number << 3 | 2, len(value))) + value for number, value in fields)


def read_versions(reply: bytes) -> tuple[str, str]:
    """Of an InternalKVGetReply that holds a JSON object; its other fields hold no braces."""
    start, end = reply.find(b"{"), reply.rfind(b"}")
    with suppress(ValueError):
        facts = json.loads(reply[start : end + 1])
        if isinstance(facts, dict):
            return _short(facts.get("ray_version")), _short(facts.get("python_version"))
    return "", ""


def _short(value: object) -> str:
    """What another machine says of itself, as one short printable word."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 40 else ""
