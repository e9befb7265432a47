"""How much memory bodies of requests may take in one gateway, in all. Called by `gateway.http.app`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.errors import RouterBusy

MOST_BYTES = 256 << 20
FREE_BYTES = 256 << 10
"""Of each body, which are not counted: text gets through whatever others upload."""
RETRY_AFTER_S = 2.0

Hold = Callable[[int], None]
"""Told how long a body has become. Raises RouterBusy where there is no room for so much."""


def no_matter(_num_bytes: int) -> None:
    """Of bodies that are small enough."""


class BodyRoom:
    """Counts bodies until what is in them was taken out, on one event loop. Half of the room is for one owner, so that
    nobody's uploads shut out all others'."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._held: Counter[str] = Counter()

    @property
    def nbytes(self) -> int:
        return self._held.total()

    @contextmanager
    def entered(self, owner: str) -> Iterator[Hold]:
        """Room for one body of this owner, until the context ends."""
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            more = max(0, num_bytes - FREE_BYTES) - held
            is_too_much = self.nbytes + more > self._most_bytes
            if more > 0 and (is_too_much or self._held[owner] + more > self._most_bytes // 2):
                raise RouterBusy(RETRY_AFTER_S)
            held += more
            self._held[owner] += more

        try:
            yield hold
        finally:
            self._held[owner] -= held
            if not self._held[owner]:
                del self._held[owner]
