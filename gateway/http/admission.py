"""How many generations one gateway has open. Beyond that a request is refused before its body is read, so refusing
costs next to nothing and bodies in memory are bounded. Called by `gateway.http.request_envelope`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gateway.errors import RouterBusy, to_api_error

RETRY_AFTER_S = 1.0


class Admission:
    """A count, on one event loop."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self.num_open = 0

    @contextmanager
    def entered(self, method: str) -> Iterator[None]:
        """Counts POST requests, which are those that generate, until the context ends. Raises ApiError 429."""
        if method != "POST":
            yield
            return
        if self.num_open >= self._max_open:
            raise to_api_error(RouterBusy(RETRY_AFTER_S))
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1
