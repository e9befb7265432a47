"""Actors that are left alone for a while after they failed, longer each time, so that not every token pays for them.

An actor that is lost needs none of this: its connection is closed. This is for actors that answer with errors in some
layer, or whose answers come too late although their heartbeats come. Used by `experts.remote_directory`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

SHORTEST_S, LONGEST_S = 1.0, 30.0
ALL_LAYERS = ("", -1)
"""In place of (component, layer)."""


class Suspensions:
    """By actor and layer. Safe for several threads; costs nothing while nobody is suspended."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, tuple[str, int]], tuple[int, float]] = {}
        """How often in a row, and until when."""
        self._lock = threading.Lock()

    def note(self, name: str, layer: tuple[str, int], now_s: float) -> None:
        """It failed: leave it alone for 1 s, the next time for 2 s, then 4 s, at most for 30 s."""
        with self._lock:
            times, _ = self._entries.get((name, layer), (0, 0.0))
            wait_s = min(LONGEST_S, SHORTEST_S * 2.0 ** min(times, 10))
            self._entries[name, layer] = times + 1, now_s + wait_s

    def clear(self, name: str, layer: tuple[str, int]) -> None:
        """It answered."""
        if self._entries:
            with self._lock:
                self._entries.pop((name, layer), None)
                self._entries.pop((name, ALL_LAYERS), None)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget actors that have left the roster."""
        with self._lock:
            for entry in [entry for entry in self._entries if entry[0] not in names]:
                del self._entries[entry]

    def is_any_of(self, names: Collection[str]) -> bool:
        """Whether some of these have failed and not answered there since."""
        if not self._entries:
            return False
        with self._lock:
            return any(name in names for name, _ in self._entries)

    def of(self, layer: tuple[str, int], now_s: float) -> frozenset[str]:
        """Who is not to be asked for experts of this layer now."""
        if not self._entries:
            return frozenset()
        with self._lock:
            return frozenset(
                name
                for (name, where), (_, until_s) in self._entries.items()
                if where in (layer, ALL_LAYERS) and now_s < until_s
            )
