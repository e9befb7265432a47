"""How much memory the sound of open answers may take in this process, in all, half of it one owner's. Called by
`gateway.http.completions`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.errors import RouterBusy

RETRY_AFTER_S = 2.0
MOST_SPOKEN_BYTES = 1 << 30
"""68 answers of the greatest length, 34 of one owner."""


class AnswerRoom:
    """Counts, on one event loop. An answer takes room for its longest sound before it begins, so that none is refused
    in the middle."""

    def __init__(self, most_bytes: int = MOST_SPOKEN_BYTES) -> None:
        self._most_bytes = most_bytes
        self._taken: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return self._taken.total()

    @contextmanager
    def taken(self, num_bytes: int, owner: str = "") -> Iterator[None]:
        """Raises RouterBusy where there would be more than the most; a single answer of somebody's always fits."""
        own, all_bytes = self._taken[owner], self.num_bytes
        if num_bytes and (
            (own and own + num_bytes > self._most_bytes // 2)
            or (all_bytes and all_bytes + num_bytes > self._most_bytes)
        ):
            raise RouterBusy(RETRY_AFTER_S)
        self._taken[owner] += num_bytes
        try:
            yield
        finally:
            self._taken[owner] -= num_bytes
            if not self._taken[owner]:
                del self._taken[owner]
