"""Cuts off a client that takes nothing of its answer for a while: what has been sent to it would stay in memory, and
keep the server from stopping, for as long as it likes. The outermost ASGI middleware of `gateway.http.server`, which
alone sees how fast a client reads. What the system's own buffers hold counts as taken."""

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
LOOK_S = 0.5
"""How often we look whether a client takes the rest of its answer."""


class StallGuard:
    """ASGI middleware between uvicorn and an app. To the app, a client that was cut off has closed its connection."""

    def __init__(self, app: ASGIApp, stall_s: float = STALL_S) -> None:
        self._app, self._stall_s = app, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = _transport(send)
        if scope["type"] != "http" or transport is None:
            await self._app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stall_s):
                    await send(message)
            except TimeoutError:
                self._cut_off(transport)

        await self._app(scope, receive, send_in_time)
        await self._see_rest_taken(transport)

    async def _see_rest_taken(self, transport: Any) -> None:
        """Returns when nothing is left to be taken. uvicorn's `send` waits only for what was sent before."""
        loop = asyncio.get_running_loop()
        num_left, taken_at_s = transport.get_write_buffer_size(), loop.time()
        while num_left:
            await asyncio.sleep(min(LOOK_S, self._stall_s / 4))
            num_before, num_left = num_left, transport.get_write_buffer_size()
            if num_left < num_before:
                taken_at_s = loop.time()
            elif loop.time() - taken_at_s >= self._stall_s:
                self._cut_off(transport)
                return

    def _cut_off(self, transport: Any) -> None:
        """Closing would first wait until the client has taken what is buffered, which it does not do."""
        logger.info("a client took nothing for %g s and is cut off", self._stall_s)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.fileno() >= 0:  # let go of what the system has buffered, too
            with socket.socket(fileno=os.dup(connection.fileno())) as same:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


def _transport(send: Any) -> Any:
    """uvicorn's `send` is a method of the object that holds the transport; of other servers' nothing is known."""
    transport: Any = getattr(getattr(send, "__self__", None), "transport", None)
    return transport if hasattr(transport, "abort") else None
