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

import uvicorn
from starlette.types import ASGIApp

from gateway.http.listener import open_listener
from gateway.http.stalled_clients import STALL_S, StallGuard

logger = logging.getLogger(__name__)

BIND_PATIENCE_S, BIND_RETRY_S = 10.0, 0.1
"""A gateway that is replaced may hold its port a moment longer than the new one needs to start."""
KEEP_ALIVE_S = 90
"""How long a connection between two requests stays open."""


class HttpServer:
    """One app on one port, from `start` to `stop`."""

    def __init__(self, app: ASGIApp, stall_s: float = STALL_S) -> None:
        self._server = uvicorn.Server(
            uvicorn.Config(
                StallGuard(app, stall_s),
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                log_level="critical",  # what it warns of is what strangers send, who could fill the log
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
        if self._serving is None:
            return
        await asyncio.wait({self._serving})  # goes on where nobody waits for it any more
        if not self._serving.cancelled():
            self._serving.result()


async def _bound(address: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + BIND_PATIENCE_S
    while True:
        try:
            return open_listener(address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or loop.time() > give_up_at:
                raise
            logger.info("port %d is taken; trying again", port)
        await asyncio.sleep(BIND_RETRY_S)
