"""Stands around Ray Serve's proxy, in its process: what neither Serve nor our replicas can do there.

- A client that takes nothing of its answer for a while is cut off. (Replicas hand their answers to the proxy at
  once; only the proxy sees how fast a client reads.)
- Serve's own pages, /-/routes and /-/healthz, which ask for no key, are not there.
- Serve's own refusals, plain text, get the shape of OpenAI's errors, so that clients understand them.

Ray Serve calls `middlewares`; `gateway.service.launch` tells it to.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import ApiError

logger = logging.getLogger(__name__)

STALL_S = 30.0
MESSAGES = {
    408: "The request took too long.",
    429: "The service has too many requests open. Please try again later.",
    503: "The service has too many requests open, or is not available. Please try again later.",
}
CODES = {408: "timeout", 429: "queue_full", 503: "unavailable"}


def middlewares() -> list[Middleware]:
    """Called by Ray Serve when its proxy starts."""
    return [Middleware(ProxyGuard)]


class ProxyGuard:
    """ASGI middleware between uvicorn and Serve's proxy."""

    def __init__(self, app: ASGIApp, stall_s: float = STALL_S) -> None:
        self._app, self._stall_s = app, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/-/"):
            absent = ApiError(404, "There is no such route.")
            await JSONResponse(absent.body(), absent.status)(scope, receive, send)
        elif scope["type"] == "http":
            await self._app(scope, receive, _Answer(send, self._stall_s).send)
        else:
            await self._app(scope, receive, send)


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, send: Send, stall_s: float) -> None:
        self._send, self._stall_s = send, stall_s
        self._replacement: JSONResponse | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._replacement = _replacement(message)
            if self._replacement is not None:
                return  # sent with its body
        elif self._replacement is not None:
            if not message.get("more_body", False):
                await self._replacement({"type": "http"}, _receive_nothing, self._send_in_time)
            return
        await self._send_in_time(message)

    async def _send_in_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send(message)
        except TimeoutError:
            logger.info("a client took nothing for %g s and is cut off", self._stall_s)
            _abort(self._send)
            raise ConnectionAbortedError("the client takes nothing") from None


def _replacement(start: Message) -> JSONResponse | None:
    """For an answer of Serve's own: the gateway's errors are JSON, Serve's are text."""
    headers: dict[bytes, bytes] = {name.lower(): value for name, value in start.get("headers", ())}
    status = int(start["status"])
    if status < 400 or headers.get(b"content-type", b"").startswith(b"application/json"):
        return None
    given = headers.get(b"retry-after", b"1" if status in (429, 503) else b"")
    retry_after_s = float(given) if given.isdigit() else None
    error = _error(status, retry_after_s)
    kept = {b"x-request-id": headers[b"x-request-id"]} if b"x-request-id" in headers else {}
    answer = JSONResponse(error.body(), status, error.headers())
    answer.raw_headers.extend(kept.items())
    return answer


def _error(status: int, retry_after_s: float | None) -> ApiError:
    if status >= 500:
        text, kind, code = MESSAGES.get(status, "Internal error."), "server_error", "internal_error"
    else:
        text, kind, code = MESSAGES.get(status, "The request was refused."), "invalid_request_error", None
    kind = "rate_limit_error" if status == 429 else kind
    return ApiError(status, text, kind, None, CODES.get(status, code), retry_after_s)


def _abort(send: Any) -> None:
    """Closing would first wait until the client has taken what is buffered, which it does not do. uvicorn's `send`
    is a method of the object that holds the transport; elsewhere nothing is found and the error closes."""
    transport: Any = getattr(getattr(send, "__self__", None), "transport", None)
    if not hasattr(transport, "abort"):
        return
    connection = transport.get_extra_info("socket")
    if connection is not None:  # let go of what the system has buffered, too
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _receive_nothing() -> Message:
    return {"type": "http.disconnect"}
