"""The gateway's own HTTP port: uvicorn on the event loop of its process.

Ray Serve's proxy would be another process, which gets every piece of every answer as an object of Ray's. What that
costs, and what it would bring, is weighed in docs/decisions/0007-the-gateway-listens.md. Knows nothing of Ray. Started
by `gateway.service.gateway_replica`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from gateway.http.stalled_clients import StallGuard

logger = logging.getLogger(__name__)

BIND_PATIENCE_S, BIND_RETRY_S = 10.0, 0.1
"""A gateway that is replaced may hold its port a moment longer than the new one needs to start."""
BACKLOG = 2048
"""Connections that the system accepts before we do."""
KEEP_ALIVE_S = 90
"""How long a connection between two requests stays open."""


class HttpServer:
    """One app on one port, from `start` to `stop`."""

    def __init__(self, app: ASGIApp) -> None:
        self._server = uvicorn.Server(
            uvicorn.Config(
                StallGuard(app),
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                proxy_headers=False,  # who a client says it is matters to nobody here
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def is_serving(self) -> bool:
        return self._serving is not None and not self._serving.done()

    async def start(self, address: str, port: int) -> None:
        """Returns when the port is open. Raises OSError where it cannot be had."""
        listener = await _bound(address, port)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Take no more connections, and return when the answers that have begun are at their ends."""
        self._server.should_exit = True
        if self._serving is not None:
            with suppress(asyncio.CancelledError):
                await self._serving


async def _bound(address: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + BIND_PATIENCE_S
    is_v6 = ":" in address
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    is_dual = is_v6 and socket.has_dualstack_ipv6()
    while True:
        try:
            return socket.create_server(
                (address, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_dual
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE or loop.time() > give_up_at:
                raise
            logger.info("port %d is taken; trying again", port)
        await asyncio.sleep(BIND_RETRY_S)
