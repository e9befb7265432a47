"""Reads of experts that were only guessed to be needed: those under way, and what became of the guesses.

Owns no buffer and decides nothing about memory: `experts.cache` admits a guess to the budget before it is begun here,
and hands a buffer back only after `stop`. Not safe for several threads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future

from torch import Tensor

from experts.loader import LOAD_THREADS, ExpertLoader
from extraction.manifest import ExpertKey

MOST_READS = 2 * LOAD_THREADS
"""Of one guess. What a whole prompt wants next would else fill the disk's queue before anybody asked."""


class GuessedReads:
    """Begun, then claimed by who needs them, received when they are done, or stopped."""

    def __init__(self, loader: ExpertLoader) -> None:
        self.begun = 0
        """Reads that were not cancelled before they began."""
        self.used = 0
        """Experts of these that were needed before they went."""
        self._loader = loader
        self._reading: dict[ExpertKey, Future[Tensor]] = {}
        self._unused: set[ExpertKey] = set()

    @property
    def is_reading(self) -> bool:
        return bool(self._reading)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being read, and everything that was read has been used."""
        return not self._reading and not self._unused

    def begin(self, key: ExpertKey, window: Tensor) -> None:
        """Read on another thread. The window belongs to it until the read was received, claimed or stopped."""
        self._reading[key] = self._loader.start(key, window)
        self._unused.add(key)
        self.begun += 1

    def receive(self) -> list[tuple[ExpertKey, Tensor | None]]:
        """Reads that have ended since, each once: its record, or None where it failed, which the loader has logged."""
        done = [key for key, future in self._reading.items() if future.done()]
        futures = [self._reading.pop(key) for key in done]
        return [
            (key, None if future.exception() else future.result())
            for key, future in zip(done, futures, strict=True)
        ]

    def cancel(self, kept: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        """Take back what no thread has begun, except these. Returns the experts that will not come."""
        cancelled = [key for key, future in self._reading.items() if key not in kept and future.cancel()]
        for key in cancelled:
            del self._reading[key]
            self._unused.discard(key)
        self.begun -= len(cancelled)
        return cancelled

    def claim(self, wave: Sequence[ExpertKey]) -> dict[Future[Tensor], ExpertKey]:
        """Reads of a wave's experts that are under way; whoever claims them waits for them."""
        return {self._reading.pop(key): key for key in wave if key in self._reading}

    def count_used(self, wave: Sequence[ExpertKey]) -> int:
        """How many of a wave's experts are there, or on their way, by a guess and are needed for the first time."""
        right = self._unused.intersection(wave)
        self._unused -= right
        self.used += len(right)
        return len(right)

    def stop(self, key: ExpertKey) -> bool:
        """Forget an expert; returns when no thread writes to its buffer any more. Whether its record was read."""
        self._unused.discard(key)
        future = self._reading.pop(key, None)
        if future is None:
            return False
        if future.cancel():
            self.begun -= 1
            return False
        return future.exception() is None  # waits for it
