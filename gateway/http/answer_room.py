"""How much memory the sound of open answers may take in this process, in all. Called by `gateway.http.completions`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gateway.errors import RouterBusy

RETRY_AFTER_S = 2.0
MOST_SPOKEN_BYTES = 1 << 30
"""68 answers of the greatest length."""


class AnswerRoom:
    """Counts, on one event loop. An answer takes room for its longest sound before it begins, so that none is refused
    in the middle."""

    def __init__(self, most_bytes: int = MOST_SPOKEN_BYTES) -> None:
        self.num_bytes = 0
        self._most_bytes = most_bytes

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Raises RouterBusy where there would be more than the most; a single answer always fits."""
        if num_bytes and self.num_bytes and self.num_bytes + num_bytes > self._most_bytes:
            raise RouterBusy(RETRY_AFTER_S)
        self.num_bytes += num_bytes
        try:
            yield
        finally:
            self.num_bytes -= num_bytes
