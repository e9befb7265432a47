"""Events on their way from the engine's thread to an event loop, which is woken for them as rarely as can be.

To wake a loop costs its thread the lock that the engine's thread needs for the next step, so it is done for what waits
for nothing, and for the rest while somebody waits for it. Used by `router.service`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from router.request import TokenEvent

logger = logging.getLogger(__name__)


class Arrivals:
    """What an engine has put and a loop has not collected yet, in order."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Sequence[TokenEvent]], None]
    ) -> None:
        """deliver: called on the loop with each step's events."""
        self._loop, self._deliver = loop, deliver
        self._events: deque[Sequence[TokenEvent]] = deque()
        self._num_waiting = 0
        """Of those who wait for any event."""

    def put(self, events: Sequence[TokenEvent]) -> None:
        """On the engine's thread."""
        self._events.append(events)
        # In this order: who waits says so first, and then looks for what is there.
        if self._num_waiting or any(event.is_urgent for event in events):
            try:
                self._loop.call_soon_threadsafe(self.collect)
            except RuntimeError:
                logger.info("the event loop has closed; %d events are dropped", len(events))

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Deliver what is there, and for as long as the context lasts all that comes, urgent or not. On the loop."""
        self._num_waiting += 1
        try:
            self.collect()
            yield
        finally:
            self._num_waiting -= 1

    def collect(self) -> None:
        """Deliver what is there. On the loop."""
        while self._events:
            self._deliver(self._events.popleft())
