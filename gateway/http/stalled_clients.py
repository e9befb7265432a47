"""Cuts off a client that takes nothing of its answer for a while: what has been sent to it would stay in memory for as
long as it likes. The outermost ASGI middleware of `gateway.http.server`, which alone sees how fast a client reads."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

STALL_S = 30.0


class StallGuard:
    """ASGI middleware between uvicorn and an app."""

    def __init__(self, app: ASGIApp, stall_s: float = STALL_S) -> None:
        self._app, self._stall_s = app, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stall_s):
                    await send(message)
            except TimeoutError:
                logger.info("a client took nothing for %g s and is cut off", self._stall_s)
                _abort(send)
                raise ConnectionAbortedError("the client takes nothing") from None

        await self._app(scope, receive, send_in_time)


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
