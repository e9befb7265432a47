"""Which expert goes first when room is needed: decisions only, no weights and no clock of its own.

An eviction gives every use of an expert a worth; of the experts that may go, the one of lowest worth goes, and of
equals the one whose last use is longest ago. Time is a counter of steps that the caller passes in. A model visits its
layers in turn, over and over, so an expert of the layer that was just computed cannot be needed for a whole step, and
one of the layer after it may be needed at once: `lfu` and `trust` count that in. Called by `experts.residency`; what
each one is worth on real traffic is measured by `benchmarks/bench_eviction.py`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from extraction.manifest import ExpertKey

Eviction = Literal["lfu", "lru", "trust"]
EVICTIONS: tuple[Eviction, ...] = get_args(Eviction)
DEFAULT_EVICTION: Eviction = "lfu"

UNKNOWN_TRUST = 0.5
"""Of an expert that nothing is known about."""


Layer = tuple[str, int]
"""Component and number."""


class Worth(Protocol):
    """What experts are worth. Must not depend on what is resident."""

    def visit(self, layer: Layer, now: float) -> None:
        """A layer is computed at step `now`, which never falls; further visits in the same step are the same one."""
        ...

    def of_use(self, key: ExpertKey, nbytes: int, now: float) -> float:
        """Count one use, after its layer's visit. Orders the experts of one layer: higher stays longer."""
        ...

    def present(self, layer: Layer, worth: float) -> float:
        """What an expert of that worth in its layer is worth now, among all layers. Must not fall as `worth` rises."""
        ...


class LayerClock:
    """When each layer had its last turn, and how far off its next one is. All layers take turns."""

    def __init__(self) -> None:
        self._now = self._before = -math.inf
        """This step and the one before."""
        self._num_visits = 0
        self._last: dict[Layer, tuple[float, int]] = {}
        """Step and number of the last visit."""

    def visit(self, layer: Layer, now: float) -> bool:
        """Whether this begins a step."""
        last = self._last.get(layer)
        if last is not None and last[0] == now:
            return False
        self._num_visits += 1
        self._last[layer] = (now, self._num_visits)
        if now == self._now:
            return False
        self._before, self._now = self._now, now
        return True

    def is_done(self, layer: Layer) -> bool:
        """Whether the layer had its turn in this step; it had the one before in any case, if only to be left out."""
        return self._last[layer][0] == self._now

    def turn(self, layer: Layer) -> float:
        """The step of the layer's last turn."""
        return self._now if self.is_done(layer) else self._before

    def until_next(self, layer: Layer) -> float:
        """Steps until the layer's next turn, above 0 and at most 1."""
        num_layers = len(self._last)
        return max(1, self._last[layer][1] + num_layers - self._num_visits) / num_layers


class RecencyWorth:
    """`lru`: all uses are worth the same, so the last use decides."""

    def visit(self, layer: Layer, now: float) -> None:
        pass

    def of_use(self, key: ExpertKey, nbytes: int, now: float) -> float:
        return 0.0

    def present(self, layer: Layer, worth: float) -> float:
        return 0.0


class FrequencyWorth:
    """`lfu`: the number of uses, each of which counts half after every half-life, as an expected wait.

    An expert that was used in a share p of its layer's turns will be needed, if every turn is drawn alike, after
    1 / p - 1 turns that pass it over and the way to its layer's next turn; the longest wait goes first. Where uses are
    rare that is the order of counts. Where a step needs nearly every expert, it keeps Belady's optimum for a loop:
    experts of the layer just left go, not those that come next.

    Kept as log2 of the sum of 2 ** (step of use / half-life): decay changes all experts of a layer alike, so nobody
    has to be visited when time passes, and the logarithm never overflows. Steps are counted in the same way, from the
    first one on. Experts that went keep their count, since what was needed often before will be again: one number for
    each expert of the store.
    """

    def __init__(self, half_life: float) -> None:
        """half_life: in steps."""
        self._half_life = half_life
        self._level: dict[ExpertKey, float] = {}
        self._clock = LayerClock()
        self._steps = self._steps_before = -math.inf
        """The decayed number of steps, with and without this one."""

    def visit(self, layer: Layer, now: float) -> None:
        if self._clock.visit(layer, now):
            self._steps_before = self._steps
            self._steps = _add_log2(self._steps, now / self._half_life)

    def of_use(self, key: ExpertKey, nbytes: int, now: float) -> float:
        use = now / self._half_life
        level = self._level.get(key)
        self._level[key] = level = use if level is None else _add_log2(level, use)
        return level

    def present(self, layer: Layer, worth: float) -> float:
        """Minus log2 of the expected wait, in steps."""
        turns = self._steps if self._clock.is_done(layer) else self._steps_before
        rarity = max(0.0, turns - worth)
        if rarity > MAX_DOUBLINGS:  # the way to the next turn is nothing beside it
            return -rarity
        return -math.log2(2.0**rarity - 1.0 + self._clock.until_next(layer))


def _add_log2(first: float, second: float) -> float:
    """log2 of the sum of two numbers of which the log2 is given."""
    high, low = (second, first) if second > first else (first, second)
    return high + math.log2(1.0 + 2.0 ** (low - high))


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
    age outweigh everything. Age is the number of its layer's turns that passed it over, and the way to the next turn.
    It grows alike for a layer's experts, so what is kept is the sum without the present time. Trust is read at each
    use.
    Source: seed/phase-3-summary.md, "Trust-weighted LRU eviction".
    """

    def __init__(self, trust: Callable[[ExpertKey], float], weights: TrustWeights) -> None:
        """trust: an expert's score in [0, 1]."""
        self._trust, self._weights = trust, weights
        self._clock = LayerClock()

    def visit(self, layer: Layer, now: float) -> None:
        self._clock.visit(layer, now)

    def of_use(self, key: ExpertKey, nbytes: int, now: float) -> float:
        weights = self._weights
        distrust = weights.distrust * (1.0 - self._trust(key))
        return weights.recency * now / weights.horizon - distrust - weights.size * nbytes / weights.size_unit

    def present(self, layer: Layer, worth: float) -> float:
        weights, clock = self._weights, self._clock
        return worth - weights.recency * (clock.turn(layer) + clock.until_next(layer)) / weights.horizon


MAX_DOUBLINGS = 50.0
"""From here on a double does not see a step's part beside 2 to that power."""
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


NEVER_USED = -math.inf
"""What an expert is worth that is there by a guess only, in its layer and among all."""
Entry = tuple[float, int, ExpertKey]
"""Worth in its layer, number of the last use, and the expert."""


@dataclass
class _LayerOrder:
    """The experts of one layer that are resident.

    A use is a dictionary entry; the heap learns of it when the expert comes up. An entry for each expert stays in
    the heap that is no higher than its worth, so each use costs at most one reordering later: O(log n).
    """

    current: dict[ExpertKey, Entry] = field(default_factory=dict)
    heap: list[Entry] = field(default_factory=list)

    def use(self, entry: Entry) -> None:
        before = self.current.get(entry[2])
        self.current[entry[2]] = entry
        if before is None or entry < before:
            heapq.heappush(self.heap, entry)
            if len(self.heap) > 2 * len(self.current) + 16:
                self.heap = list(self.current.values())
                heapq.heapify(self.heap)

    def lowest(self) -> Entry | None:
        """Of the experts whose entries are in the heap; it is then the heap's first."""
        while self.heap:
            entry = self.heap[0]
            current = self.current.get(entry[2])
            if current is None or current < entry:
                heapq.heappop(self.heap)  # gone, or in the heap a second time and lower
            elif current > entry:
                heapq.heapreplace(self.heap, current)
            else:
                return entry
        return None


class EvictionOrder:
    """The experts that are resident, by layer, lowest worth first. Costs O(log n) a use and an eviction, and for each
    call that evicts one look at every layer."""

    def __init__(self, worth: Worth) -> None:
        self._worth = worth
        self._ticks = 0
        self._layers: dict[Layer, _LayerOrder] = {}

    def __len__(self) -> int:
        return sum(len(layer.current) for layer in self._layers.values())

    def visit(self, keys: Iterable[ExpertKey], now: float) -> None:
        """These are the experts that their layers need in step `now`: to be said before anything goes for them."""
        for layer in dict.fromkeys((key.component, key.layer) for key in keys):
            self._worth.visit(layer, now)

    def use(self, key: ExpertKey, nbytes: int, now: float) -> None:
        """Count a use; an expert that is not in the order enters it."""
        self.use_all((key,), (nbytes,), now)

    def use_all(self, keys: Sequence[ExpertKey], sizes: Sequence[int], now: float) -> None:
        """The same for several, one after another."""
        name, layer = None, _LayerOrder()
        for key, nbytes in zip(keys, sizes, strict=True):
            if name != (key.component, key.layer):
                name = (key.component, key.layer)
                self._worth.visit(name, now)
                layer = self._layers.setdefault(name, _LayerOrder())
            self._ticks += 1
            layer.use((self._worth.of_use(key, nbytes, now), self._ticks, key))

    def expect(self, key: ExpertKey) -> None:
        """Let an expert enter that nobody has used yet. It counts no use, and goes before all that were used."""
        self._ticks += 1
        layer = self._layers.setdefault((key.component, key.layer), _LayerOrder())
        layer.use((NEVER_USED, self._ticks, key))

    def discard(self, key: ExpertKey) -> None:
        """Take an expert out of the order; its uses still count."""
        layer = self._layers.get((key.component, key.layer))
        if layer is not None:
            layer.current.pop(key, None)

    def going(self, kept: Collection[ExpertKey]) -> Generator[ExpertKey]:
        """Experts that are not among `kept`, lowest worth first; each that is asked for is taken out.

        To be closed before the next use.
        """
        passed: list[Entry] = []
        fronts = [front for name in self._layers if (front := self._front(name)) is not None]
        heapq.heapify(fronts)
        try:
            while fronts:
                _, _, key, name = fronts[0]
                layer = self._layers[name]
                entry = heapq.heappop(layer.heap)
                if key in kept:
                    passed.append(entry)
                else:
                    del layer.current[key]
                    yield key
                front = self._front(name)
                if front is None:
                    heapq.heappop(fronts)
                else:
                    heapq.heapreplace(fronts, front)
        finally:
            for entry in passed:
                heapq.heappush(self._layers[entry[2].component, entry[2].layer].heap, entry)

    def _front(self, name: Layer) -> tuple[float, int, ExpertKey, Layer] | None:
        """A layer's lowest, with what it is worth among all."""
        entry = self._layers[name].lowest()
        if entry is None:
            return None
        worth = entry[0] if entry[0] == NEVER_USED else self._worth.present(name, entry[0])
        return worth, entry[1], entry[2], name
