"""How many requests one gateway has open. Beyond that a request is refused before its body is read, so refusing
costs next to nothing and bodies in memory are bounded. Called by `gateway.http.request_envelope`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gateway.errors import ApiError, RouterBusy, to_api_error

RETRY_AFTER_S = 1.0
TOO_MANY = "The service has too many requests open. Please try again later."
SPARE_REQUESTS = 384
"""Requests beyond twice the generations; with the default options 1,024 in all."""


class Admission:
    """Counts, on one event loop."""

    def __init__(self, max_generations: int) -> None:
        """max_generations: open at the same time. Of all requests there may be more, so that refusals, status and
        readiness get through."""
        self._max_generations, self._max_requests = max_generations, 2 * max_generations + SPARE_REQUESTS
        self.num_generations = self.num_requests = 0

    @contextmanager
    def entered(self, method: str) -> Iterator[None]:
        """Counts a request until the context ends; those that generate are POST requests. Raises ApiError: 503 where
        there are too many of all, 429 where only of those."""
        if self.num_requests >= self._max_requests:
            raise ApiError(503, TOO_MANY, "server_error", None, "unavailable", RETRY_AFTER_S)
        is_generation = method == "POST"
        if is_generation and self.num_generations >= self._max_generations:
            raise to_api_error(RouterBusy(RETRY_AFTER_S))
        self.num_requests += 1
        self.num_generations += is_generation
        try:
            yield
        finally:
            self.num_requests -= 1
            self.num_generations -= is_generation
