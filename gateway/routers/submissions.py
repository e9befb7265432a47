"""Requests on their way to one router: those that come while a call is on its way go together in the next.

A call costs some milliseconds of both processes, however many requests it carries; one that comes alone does not wait.
Knows nothing of Ray. Used by `gateway.routers.serve_router_client`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from gateway.routers.detached import detached
from router.request import GenerationRequest

Send = Callable[[tuple[GenerationRequest, ...]], Awaitable[Sequence[Exception | None]]]


class Submissions:
    """Of one gateway to one router, on one event loop."""

    def __init__(self, send: Send) -> None:
        """send: of each request, why it was refused, or None."""
        self._send = send
        self._waiting: list[tuple[GenerationRequest, asyncio.Future[None]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, request: GenerationRequest) -> None:
        """Returns when the router has taken it. Raises its refusal, or what sending raised. Whoever stops waiting does
        not know whether it was sent."""
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, accepted))
        if self._sender is None or self._sender.done():
            self._sender = detached(self._send_all())
        await accepted

    async def _send_all(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            refusals: Sequence[Exception | None]
            try:
                refusals = await self._send(tuple(request for request, _ in taken))
            except Exception as error:  # noqa: BLE001 - raised where each request is waited for
                refusals = [error] * len(taken)
            for (_, accepted), refusal in zip(taken, refusals, strict=True):
                if accepted.done():  # nobody waits any more
                    continue
                if refusal is None:
                    accepted.set_result(None)
                else:
                    accepted.set_exception(refusal)
