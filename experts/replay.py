"""What caches would have done with recorded traffic: every eviction, and the best that any could have done.

Pure functions over traces, for benchmarks and evaluations; no weights are read.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from experts.eviction import Worth
from experts.residency import Residency
from extraction.manifest import ExpertKey

Trace = Sequence[Sequence[ExpertKey]]
"""For each call, in order, the distinct experts that it needed."""


@dataclass(frozen=True)
class CacheCount:
    """Uses of experts, and how many of them were resident."""

    uses: int
    hits: int

    @property
    def hit_rate(self) -> float:
        """0 where nothing was used."""
        return self.hits / self.uses if self.uses else 0.0


def replay(trace: Trace, steps: Sequence[float], capacity: int, worth: Worth) -> CacheCount:
    """A cache of `capacity` experts of equal size under an eviction. steps: of each call, never falling."""
    residency = Residency(capacity, worth)
    uses = misses = 0
    for keys, now in zip(trace, steps, strict=True):
        ones = [1] * len(keys)
        for wave in residency.waves(ones):
            exchange = residency.admit(keys[wave.start : wave.stop], ones[wave.start : wave.stop], now)
            misses += len(exchange.load)
        uses += len(keys)
    return CacheCount(uses, uses - misses)


def replay_belady(trace: Trace, capacity: int) -> CacheCount:
    """The most hits that any eviction can have, knowing the future: of equal experts, furthest next use goes first.

    Calls that need more than `capacity` experts are cut into waves as everywhere. O(n log n) in the trace's uses.
    Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal
    5(2), 1966.
    """
    waves = [call[i : i + capacity] for call in trace for i in range(0, len(call), capacity)]
    following = _next_uses(waves)
    next_use: dict[ExpertKey, float] = {}
    heap: list[tuple[float, ExpertKey]] = []
    uses = misses = 0
    for wave, after in zip(waves, following, strict=True):
        missing = [key for key in wave if key not in next_use]
        wave_set = frozenset(wave)
        while len(next_use) + len(missing) > capacity:
            furthest, key = heapq.heappop(heap)
            # The wave's own experts are due now, so they come up last; entries of earlier uses are no longer true.
            if next_use.get(key) == -furthest and key not in wave_set:
                del next_use[key]
        for key, index in zip(wave, after, strict=True):
            next_use[key] = index
            heapq.heappush(heap, (-index, key))
        uses += len(wave)
        misses += len(missing)
    return CacheCount(uses, uses - misses)


def _next_uses(waves: Trace) -> list[list[float]]:
    """For each use, the index of the next wave that needs the same expert; infinite where none does."""
    seen: dict[ExpertKey, float] = {}
    following: list[list[float]] = []
    for index in range(len(waves) - 1, -1, -1):
        following.append([seen.get(key, math.inf) for key in waves[index]])
        seen.update(dict.fromkeys(waves[index], float(index)))
    return following[::-1]
