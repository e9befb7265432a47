"""How much memory media of open requests may take in this process, in all. Called by `gateway.media.decoder`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.errors import RouterBusy
from router.media.items import Medium

RETRY_AFTER_S = 2.0


class HeldBytes:
    """Counts what is to be decoded, and media until nobody has them any more."""

    def __init__(self, most_bytes: int) -> None:
        self.nbytes = 0
        self._most_bytes = most_bytes
        self._lock = threading.RLock()  # a medium may be given up by whatever this thread does just then

    @contextmanager
    def reserved(self, num_bytes: int) -> Iterator[None]:
        """Of encoded media while they are decoded. Raises RouterBusy where more than half would be held: the rest is
        room for what those that have begun are decoded to."""
        with self._lock:
            if self.nbytes and self.nbytes + num_bytes > self._most_bytes // 2:
                raise RouterBusy(RETRY_AFTER_S)
            self.nbytes += num_bytes
        try:
            yield
        finally:
            self._give_back(num_bytes)

    def hold(self, medium: Medium) -> None:
        """Until it is given up. Raises RouterBusy where it is too much: a small file may hold a large picture."""
        with self._lock:
            if self.nbytes + medium.nbytes > self._most_bytes:
                raise RouterBusy(RETRY_AFTER_S)
            self.nbytes += medium.nbytes
        weakref.finalize(medium, self._give_back, medium.nbytes).atexit = False

    def _give_back(self, num_bytes: int) -> None:
        with self._lock:
            self.nbytes -= num_bytes
