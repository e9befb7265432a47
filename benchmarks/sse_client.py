"""A streaming completion over HTTP with as little work for the client as can be: it shares the cores with the service.

One connection a request, loopback only. Called by `benchmarks.peer_served` and `benchmarks.open_loop`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from time import perf_counter
from typing import Any

MAX_LINE_BYTES = 1 << 20
DONE = b"[DONE]"


class NotLoopback(ValueError):
    """A load client must not be pointed at other people's machines."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host

    def __str__(self) -> str:
        return f"{self.host}: only an address of this machine (127.0.0.1, ::1) is measured"


class RequestFailed(Exception):
    """The service refused, or ended an answer with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message

    def __str__(self) -> str:
        return f"HTTP {self.status}: {self.message}"


@dataclass
class Answer:
    """What came, and when: readings of `perf_counter`."""

    sent_at: float
    event_at: list[float] = field(default_factory=list)
    """Of each event that brought text or could have."""
    text: str = ""
    num_tokens: int = 0

    @property
    def first_s(self) -> float:
        return self.event_at[0] - self.sent_at

    @property
    def last_s(self) -> float:
        return self.event_at[-1] - self.sent_at


def check_loopback(host: str) -> None:
    """Raises NotLoopback for anything but a literal loopback address."""
    try:
        is_loopback = ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise NotLoopback(host)


async def stream_completion(host: str, port: int, body: Mapping[str, Any]) -> Answer:
    """POST /v1/completions with `stream` and usage. Raises NotLoopback, RequestFailed or OSError."""
    check_loopback(host)
    whole = {**body, "stream": True, "stream_options": {"include_usage": True}}
    payload = json.dumps(whole).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\nconnection: close\r\n\r\n"
    )
    sent_at = perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)
    try:
        writer.write(head.encode() + payload)
        await writer.drain()
        status, is_chunked = await _read_head(reader)
        if status != 200:
            raise RequestFailed(status, (await reader.read(2000)).decode(errors="replace"))
        answer = Answer(sent_at)
        async for data in _events(reader, is_chunked=is_chunked):
            if data == DONE:
                return answer
            _take(answer, json.loads(data))
        raise RequestFailed(status, "the answer ended early")
    finally:
        writer.close()


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        raise RequestFailed(200, str(event["error"].get("message")))
    if event.get("usage"):
        answer.num_tokens = event["usage"]["completion_tokens"]
    if event["choices"]:
        answer.event_at.append(perf_counter())
        answer.text += event["choices"][0]["text"]


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the body comes in chunks."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    return int(lines[0].split()[1]), any(
        line.startswith("transfer-encoding:") and "chunked" in line for line in lines
    )


async def _events(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    """The data of each server-sent event of one line; what else there is (comments) is left out."""
    rest = b""
    async for part in _parts(reader, is_chunked=is_chunked):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _parts(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    if not is_chunked:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
