"""A router in the test's own process whose engine is stepped on the event loop, so that it can die at a chosen step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from gateway.errors import RouterLost, RouterUnavailable
from gateway.routers.client import RouterHealth
from router.engine import Engine
from router.request import GenerationRequest, TokenEvent


class SteppedRouter:
    """A `RouterLink` over an engine of its own."""

    def __init__(self, engine: Engine, num_steps: int | None = None) -> None:
        """num_steps: after so many it is dead for ever."""
        self.engine = engine
        self._num_steps = num_steps
        self._events: dict[str, asyncio.Queue[TokenEvent]] = {}

    @property
    def is_dead(self) -> bool:
        return self._num_steps == 0

    def _step(self) -> None:
        if self._num_steps is not None:
            self._num_steps -= 1
        for event in self.engine.step():
            self._events[event.request_id].put_nowait(event)
        if self.is_dead:
            for name in self.engine.open_requests():
                self.engine.cancel(name)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        if self.is_dead:
            raise RouterUnavailable("it is dead")
        self.engine.submit(request)
        queue = self._events[request.request_id] = asyncio.Queue()
        try:
            while True:
                await asyncio.sleep(0)  # for others to join the next step
                if queue.empty() and self.is_dead:
                    raise RouterLost("it died")
                if queue.empty():
                    self._step()
                    continue
                event = queue.get_nowait()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.engine.cancel(request.request_id)
            del self._events[request.request_id]

    def abandon(self) -> None:
        raise AssertionError("nothing hangs here")

    async def feedback(self, answer_id: str, score: float) -> bool:
        return False

    async def health(self) -> RouterHealth:
        return RouterHealth(not self.is_dead, "idle")

    async def metrics(self) -> str:
        return ""

    async def status(self) -> dict[str, object]:
        return {}
