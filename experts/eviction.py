"""Which expert goes first when room is needed: decisions only, no weights and no clock of its own.

An eviction gives every use of an expert a worth; of the experts that may go, the one of lowest worth goes, and of
equals the one whose last use is longest ago. Time is a counter of steps that the caller passes in. Called by
`experts.residency`; what each one is worth on real traffic is measured by `benchmarks/bench_eviction.py`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from extraction.manifest import ExpertKey

Eviction = Literal["lfu", "lru", "trust"]
EVICTIONS: tuple[Eviction, ...] = get_args(Eviction)
DEFAULT_EVICTION: Eviction = "lfu"

UNKNOWN_TRUST = 0.5
"""Of an expert that nothing is known about."""


class Worth(Protocol):
    """What an expert is worth after a use. Must not depend on what is resident."""

    def of_use(self, key: ExpertKey, nbytes: int, now: float) -> float:
        """Count one use at step `now`, which never falls. Higher stays longer."""
        ...


class RecencyWorth:
    """`lru`: all uses are worth the same, so the last use decides."""

    def of_use(self, key: ExpertKey, nbytes: int, now: float) -> float:
        return 0.0


class FrequencyWorth:
    """`lfu`: the number of uses, each of which counts half after every half-life.

    Kept as log2 of the sum of 2 ** (step of use / half-life): decay changes all experts alike, so nobody has to be
    visited when time passes, and the logarithm never overflows. Experts that went keep their count, since what was
    needed often before will be again: one number for each expert of the store.
    """

    def __init__(self, half_life: float) -> None:
        """half_life: in steps."""
        self._half_life = half_life
        self._level: dict[ExpertKey, float] = {}

    def of_use(self, key: ExpertKey, nbytes: int, now: float) -> float:
        use = now / self._half_life
        level = self._level.get(key)
        if level is None:
            level = use
        else:
            high, low = (use, level) if use > level else (level, use)
            level = high + math.log2(1.0 + 2.0 ** (low - high))
        self._level[key] = level
        return level


@dataclass(frozen=True)
class TrustWeights:
    """How much each reason to let an expert go weighs."""

    recency: float = 0.4
    distrust: float = 0.4
    size: float = 0.2
    horizon: float = 64.0
    """Steps without use that weigh as much as no trust at all, where both weights are equal."""
    size_unit: int = 64 << 20
    """Bytes that weigh as much as no trust at all, where both weights are equal."""


class TrustWorth:
    """`trust`: least recently used, weighted by trust.

    An expert goes first whose `recency * age / horizon + distrust * (1 - trust) + size * nbytes / size_unit` is
    highest: the seed's three reasons, with age in units of a horizon of steps where the seed had seconds, which let
    age outweigh everything. Age grows alike for all, so what is kept is the sum without the present time. Trust is
    read at each use.
    Source: seed/phase-3-summary.md, "Trust-weighted LRU eviction".
    """

    def __init__(self, trust: Callable[[ExpertKey], float], weights: TrustWeights) -> None:
        """trust: an expert's score in [0, 1]."""
        self._trust, self._weights = trust, weights

    def of_use(self, key: ExpertKey, nbytes: int, now: float) -> float:
        weights = self._weights
        distrust = weights.distrust * (1.0 - self._trust(key))
        return weights.recency * now / weights.horizon - distrust - weights.size * nbytes / weights.size_unit


LFU_HALF_LIFE = 32.0
"""Steps. See benchmarks/results for what others cost."""


def make_worth(eviction: Eviction, trust: Callable[[ExpertKey], float] | None = None) -> Worth:
    """trust: None means that nothing is known about any expert."""
    if eviction == "lru":
        return RecencyWorth()
    if eviction == "lfu":
        return FrequencyWorth(LFU_HALF_LIFE)
    return TrustWorth(trust or _unknown, TrustWeights())


def _unknown(key: ExpertKey) -> float:
    return UNKNOWN_TRUST


class EvictionOrder:
    """The experts that are resident, lowest worth first.

    A use is a dictionary entry; the heap learns of it when the expert comes up. An entry for each expert stays in
    the heap that is no higher than its worth, so each use costs at most one reordering later: O(log n).
    """

    def __init__(self, worth: Worth) -> None:
        self._worth = worth
        self._ticks = 0
        self._current: dict[ExpertKey, tuple[float, int, ExpertKey]] = {}
        """Worth, number of the last use, and the expert."""
        self._heap: list[tuple[float, int, ExpertKey]] = []

    def __len__(self) -> int:
        return len(self._current)

    def use(self, key: ExpertKey, nbytes: int, now: float) -> None:
        """Count a use; an expert that is not in the order enters it."""
        self._ticks += 1
        entry = (self._worth.of_use(key, nbytes, now), self._ticks, key)
        before = self._current.get(key)
        self._current[key] = entry
        if before is None or entry < before:
            self._push(entry)

    def expect(self, key: ExpertKey) -> None:
        """Let an expert enter that nobody has used yet. It counts no use, and goes before all that were used."""
        self._ticks += 1
        self._current[key] = entry = (-math.inf, self._ticks, key)
        self._push(entry)

    def discard(self, key: ExpertKey) -> None:
        """Take an expert out of the order; its uses still count."""
        self._current.pop(key, None)

    def pop(self, kept: Collection[ExpertKey]) -> ExpertKey:
        """Take out the expert of lowest worth that is not among `kept`. There must be one."""
        passed = []
        while True:
            entry = self._heap[0]
            key = entry[2]
            current = self._current.get(key)
            if current is None or current < entry:
                heapq.heappop(self._heap)  # gone, or in the heap a second time and lower
            elif current > entry:
                heapq.heapreplace(self._heap, current)
            elif key in kept:
                passed.append(heapq.heappop(self._heap))
            else:
                break
        heapq.heappop(self._heap)
        del self._current[key]
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return key

    def _push(self, entry: tuple[float, int, ExpertKey]) -> None:
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._current) + 16:
            self._heap = list(self._current.values())
            heapq.heapify(self._heap)
