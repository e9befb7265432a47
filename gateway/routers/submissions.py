"""Requests on their way to one router: those that come together, or while a call is on its way, go in one.

A call costs some milliseconds of both processes, however many requests it carries. And where one request of many went
first, its answer would have begun when the others' prompts come, which then are computed a little at a time beside it.
One that comes alone waits for some turns of the event loop that has nothing else to do. Knows nothing of Ray. Used by
`gateway.routers.serve_router_client`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from gateway.errors import RouterSilent, RouterUnavailable
from gateway.routers.detached import detached
from router.request import GenerationRequest

QUIET_TURNS = 4
"""After so many turns of the event loop without another request nobody is taken to come with those that are there. From
a connection to here a request takes about as many."""
GATHER_S = 0.02
"""No request waits longer for others to come. It may wait for the call before, as long as that one takes."""

_Waiting = tuple[GenerationRequest, asyncio.Future[None]]
Send = Callable[[tuple[GenerationRequest, ...]], Awaitable[Sequence[Exception | None]]]


class Submissions:
    """Of one gateway to one router, on one event loop."""

    def __init__(self, send: Send) -> None:
        """send: of each request, why it was refused, or None. Raises RouterSilent where nobody answers."""
        self._send = send
        self._waiting: list[_Waiting] = []
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, request: GenerationRequest) -> None:
        """Returns when the router has taken it. Raises its refusal, or what sending raised: RouterSilent where it may
        have been taken, RouterUnavailable where it was not sent. Whoever stops waiting does not know whether it was."""
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, accepted))
        if self._sender is None or self._sender.done():
            self._sender = detached(self._send_all())
        await accepted

    async def _gather(self) -> None:
        """Returns when those that come together have come."""
        loop = asyncio.get_running_loop()
        until_s, num_quiet = loop.time() + GATHER_S, 0
        while num_quiet < QUIET_TURNS and loop.time() < until_s:
            num_before = len(self._waiting)
            await asyncio.sleep(0)
            num_quiet = num_quiet + 1 if len(self._waiting) == num_before else 0

    async def _send_all(self) -> None:
        taken: list[_Waiting] = []
        try:
            while self._waiting:
                await self._gather()
                taken, self._waiting = self._waiting, []
                await self._send_together(taken)
        finally:  # by whatever this ends, nobody waits for it any more
            behind, self._waiting = self._waiting, []
            _fail(taken, RouterSilent("its call broke off"))
            _fail(behind, RouterUnavailable("the call before broke off"))

    async def _send_together(self, taken: Sequence[_Waiting]) -> None:
        try:
            refusals = await self._send(tuple(request for request, _ in taken))
            if len(refusals) != len(taken):
                raise RouterSilent(f"of {len(taken)} requests it answered {len(refusals)}")
        except RouterSilent as error:
            _fail(taken, error)
            # It is not asked again by those that have waited for it meanwhile.
            behind, self._waiting = self._waiting, []
            _fail(behind, RouterUnavailable(error.detail))
        except Exception as error:  # noqa: BLE001 - raised where each request is waited for
            _fail(taken, error)
        else:
            for (_, accepted), refusal in zip(taken, refusals, strict=True):
                _end(accepted, refusal)


def _fail(waiting: Sequence[_Waiting], error: Exception) -> None:
    for _, accepted in waiting:
        _end(accepted, error)


def _end(accepted: asyncio.Future[None], refusal: Exception | None) -> None:
    if accepted.done():  # nobody waits any more, or it has been told
        return
    if refusal is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(refusal)
