"""Answers for `sage-moe chat` from a service that speaks OpenAI's API."""

from __future__ import annotations

import base64
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from gateway.chat.loop import Piece, Turn
from gateway.errors import ChatFailed
from gateway.http.api_keys import bearer_headers

TIMEOUT = httpx.Timeout(300.0, connect=10.0)
"""Between two pieces of an answer; a long queue may stand before the first."""
MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024


@dataclass
class RemoteChat:
    """One service. Made by `connect`."""

    client: httpx.Client
    model: str
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of the request that the user chose."""

    def stream(self, messages: list[Turn]) -> Generator[Piece, None, None]:
        """See ChatBackend.stream. Raises ChatFailed."""
        body = {"model": self.model, "messages": messages, **self.sampling}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with (
            _told_in_one_line(),
            self.client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                raise ChatFailed(_reason(response))
            is_whole = False
            for line in _lines(response):
                if line == b"data: [DONE]":
                    is_whole = True
                elif line.startswith(b"data: "):
                    yield _piece(line.removeprefix(b"data: "))
            if not is_whole:
                raise ChatFailed("the answer broke off")


@contextmanager
def connect(
    url: str,
    key: str | None,
    model: str | None,
    sampling: dict[str, Any],
    transport: httpx.BaseTransport | None = None,
) -> Iterator[RemoteChat]:
    """A chat with the service at `url`, with or without /v1 at its end. model: None takes the service's first.

    Raises ChatFailed when no service answers there.
    """
    base = url.rstrip("/").removesuffix("/v1")
    with _told_in_one_line():
        client = httpx.Client(
            base_url=base, headers=bearer_headers(key), timeout=TIMEOUT, transport=transport
        )
    with client:
        yield RemoteChat(client, model or _first_model(client, base), sampling)


def _first_model(client: httpx.Client, base: str) -> str:
    with _told_in_one_line(), client.stream("GET", "/v1/models") as response:
        if response.status_code != 200:
            raise ChatFailed(f"{base}: {_reason(response)}")
        names = [card["id"] for card in json.loads(_body(response))["data"]]
        if not names or not isinstance(names[0], str):
            raise ChatFailed(f"{base} serves no model")
        return names[0]


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Lines of an event stream, which end with a newline only: JSON may hold other separators as they are."""
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)
        if len(rest) > MAX_LINE_BYTES:
            raise ChatFailed(f"the service sent a line of more than {MAX_LINE_BYTES} bytes")


def _piece(data: bytes) -> Piece:
    event = json.loads(data)
    if "error" in event:
        raise ChatFailed(str(event["error"]["message"]))
    deltas = [choice["delta"] for choice in event["choices"]]
    audio = [delta.get("audio") or {} for delta in deltas]
    texts = [delta.get("content") or "" for delta in deltas] + [
        part.get("transcript") or "" for part in audio
    ]
    samples = b"".join(base64.b64decode(part.get("data") or "", validate=True) for part in audio)
    usage = event.get("usage")
    return Piece("".join(texts), _num_text_tokens(usage) if usage else None, samples)


def _num_text_tokens(usage: dict[str, Any]) -> int:
    details = usage.get("completion_tokens_details") or {}
    return int(usage["completion_tokens"]) - int(details.get("audio_tokens") or 0)


def _reason(response: httpx.Response) -> str:
    """What the service says of an error, else the status."""
    try:
        return str(json.loads(_body(response))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the service answered {response.status_code}"


def _body(response: httpx.Response) -> bytes:
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    return body


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ChatFailed(f"no answer from the service: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ChatFailed("the service's answer is not what OpenAI's API says") from error
