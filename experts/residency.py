"""Which experts stay in memory: decisions only, no weights. Called by `experts.worker` and `experts.shadow`.

`Residency` keeps the books of one byte budget, which all layers and components share: what is resident, and what
has to go when something else must come in. It never exceeds its budget and never lets go of an expert that the same
wave needs. Who goes first is for `experts.eviction` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from experts.errors import BudgetTooSmall
from experts.eviction import EvictionOrder, Worth, make_worth
from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class Exchange:
    """What must happen before a wave can be computed."""

    evict: tuple[ExpertKey, ...]
    load: tuple[ExpertKey, ...]


class Residency:
    """Costs O(log n) per expert of a wave, and one look at every layer where something goes. Not safe for several
    threads at once."""

    def __init__(self, budget_bytes: int | None, worth: Worth | None = None) -> None:
        """budget_bytes: None means that everything may stay. worth: None means the default eviction's."""
        self.budget_bytes = budget_bytes
        self.resident_bytes = 0
        self._sizes: dict[ExpertKey, int] = {}
        self._of_layer: dict[tuple[str, int], set[int]] = {}
        self._order = EvictionOrder(worth or make_worth("lfu"))

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def of_layer(self, component: str, layer: int) -> frozenset[int]:
        """Numbers of the resident experts of one layer. May be called while another thread admits."""
        return frozenset(self._of_layer.get((component, layer), ()))

    def waves(self, sizes: Sequence[int]) -> list[range]:
        """Split experts of these sizes, in order, into runs that each fit the budget.

        Raises BudgetTooSmall when one expert alone does not fit.
        """
        if self.budget_bytes is None:
            return [range(len(sizes))]
        waves: list[range] = []
        start = 0
        held = 0
        for index, nbytes in enumerate(sizes):
            if nbytes > self.budget_bytes:
                raise BudgetTooSmall(self.budget_bytes, nbytes)
            if held + nbytes > self.budget_bytes:
                waves.append(range(start, index))
                start, held = index, 0
            held += nbytes
        waves.append(range(start, len(sizes)))
        return waves

    def first_that_fit(self, keys: Sequence[ExpertKey], sizes: Sequence[int]) -> Sequence[ExpertKey]:
        """Those from the start that can be resident without anything going."""
        held = self.resident_bytes
        for index, (key, nbytes) in enumerate(zip(keys, sizes, strict=True)):
            held += 0 if key in self else nbytes
            if self.budget_bytes is not None and held > self.budget_bytes:
                return keys[:index]
        return keys

    def admit(self, wave: Sequence[ExpertKey], sizes: Sequence[int], now: float = 0.0) -> Exchange:
        """Make room for one wave and count all of it as used at step `now`, which never falls.

        The caller carries out the exchange, evictions first. A wave must be one that `waves` returned.
        """
        load = []
        needed = 0
        if self.budget_bytes is not None:
            self._order.visit(wave, now)
        for key, nbytes in zip(wave, sizes, strict=True):
            if key not in self._sizes:
                load.append(key)
                needed += nbytes
        evict = self._make_room(needed, wave)
        self.use(wave, sizes, now)
        for key, nbytes in zip(wave, sizes, strict=True):
            self._enter(key, nbytes)
        return Exchange(tuple(evict), tuple(load))

    def use(self, keys: Sequence[ExpertKey], sizes: Sequence[int], now: float) -> None:
        """Count all of these, which are resident, as used at step `now`, which never falls."""
        if self.budget_bytes is not None:
            self._order.use_all(keys, sizes, now)

    def expect(self, guess: Sequence[ExpertKey], sizes: Sequence[int], most: int) -> Exchange:
        """Make room for experts that may be used next, likeliest first, as far as they fit beside one another.

        most: experts to load. No use is counted, and until there is one they go first. The caller carries out the
        exchange as that of `admit`.
        """
        load: list[tuple[ExpertKey, int]] = []
        kept, held = [], 0
        for key, nbytes in zip(guess, sizes, strict=True):
            held += nbytes
            if len(load) == most or (self.budget_bytes is not None and held > self.budget_bytes):
                break
            kept.append(key)
            if key not in self._sizes:
                load.append((key, nbytes))
        evict = self._make_room(sum(nbytes for _, nbytes in load), kept)
        for key, nbytes in load:
            if self.budget_bytes is not None:
                self._order.expect(key)
            self._enter(key, nbytes)
        return Exchange(tuple(evict), tuple(key for key, _ in load))

    def set_budget(self, budget_bytes: int) -> tuple[ExpertKey, ...]:
        """Keep to another number of bytes from now on. Returns what has to go, lowest worth first.

        Raises ValueError where there was no bound: uses were then not counted.
        """
        if self.budget_bytes is None:
            raise ValueError("without a bound nobody knows which expert goes first")
        self.budget_bytes = budget_bytes
        return tuple(self._make_room(0, ()))

    def forget(self, key: ExpertKey) -> None:
        """Take back an admission whose load failed."""
        self._order.discard(key)
        self._remove(key)

    def _make_room(self, needed: int, wave: Sequence[ExpertKey]) -> list[ExpertKey]:
        evict: list[ExpertKey] = []
        if self.budget_bytes is None or self.resident_bytes + needed <= self.budget_bytes:
            return evict
        with closing(self._order.going(frozenset(wave))) as going:
            while self.resident_bytes + needed > self.budget_bytes:
                evict.append(next(going))
                self._remove(evict[-1])
        return evict

    def _enter(self, key: ExpertKey, nbytes: int) -> None:
        if key not in self._sizes:
            self._sizes[key] = nbytes
            self._of_layer.setdefault((key.component, key.layer), set()).add(key.expert)
            self.resident_bytes += nbytes

    def _remove(self, key: ExpertKey) -> None:
        self.resident_bytes -= self._sizes.pop(key)
        self._of_layer[key.component, key.layer].discard(key.expert)
