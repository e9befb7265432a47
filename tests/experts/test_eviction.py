"""Evictions against a slow, plain reference that looks at every resident expert at every eviction."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.eviction import (
    EVICTIONS,
    LFU_HALF_LIFE,
    Eviction,
    EvictionOrder,
    FrequencyWorth,
    TrustWeights,
    make_worth,
)
from experts.replay import replay, replay_belady
from experts.residency import Residency
from extraction.manifest import ExpertKey

WEIGHTS = TrustWeights()


def key(number: int) -> ExpertKey:
    return ExpertKey("model", number % 3, number)


def trust_of(expert: ExpertKey) -> float:
    return (expert.expert * 7 % 11) / 10


class PlainCache:
    """Keeps every use for ever and sorts all residents by the formula, with the present time in it."""

    def __init__(self, budget_bytes: int, eviction: Eviction) -> None:
        self.budget_bytes, self.eviction = budget_bytes, eviction
        self.sizes: dict[ExpertKey, int] = {}
        self.uses: dict[ExpertKey, list[float]] = {}
        self.order: list[ExpertKey] = []

    def check(
        self, evicted: Sequence[ExpertKey], wave: Sequence[ExpertKey], sizes: Sequence[int], now: float
    ) -> None:
        """Each must be of lowest worth, but for rounding, and of those exactly alike the one used longest ago; there
        must be as many as room is needed for, and no more."""
        needed = sum(n for k, n in zip(wave, sizes, strict=True) if k not in self.sizes)
        for going in evicted:
            assert sum(self.sizes.values()) + needed > self.budget_bytes
            others = [k for k in self.sizes if k not in wave]
            assert going in others
            assert self.worth(going, now) <= min(self.worth(k, now) for k in others) + 1e-9
            alike = [k for k in others if self.facts(k) == self.facts(going)]
            assert going == min(alike, key=self.last_use)
            del self.sizes[going]
        assert sum(self.sizes.values()) + needed <= self.budget_bytes
        for k, n in zip(wave, sizes, strict=True):
            self.sizes[k] = n
            self.uses.setdefault(k, []).append(now)
            self.order.append(k)

    def last_use(self, k: ExpertKey) -> int:
        return len(self.order) - 1 - self.order[::-1].index(k)

    def worth(self, k: ExpertKey, now: float) -> float:
        if self.eviction == "lru":
            return 0.0
        if self.eviction == "lfu":
            return sum(2.0 ** ((use - now) / LFU_HALF_LIFE) for use in self.uses[k])
        age = (now - self.uses[k][-1]) / WEIGHTS.horizon
        size = self.sizes[k] / WEIGHTS.size_unit
        return -(WEIGHTS.recency * age + WEIGHTS.distrust * (1 - trust_of(k)) + WEIGHTS.size * size)

    def facts(self, k: ExpertKey) -> object:
        """All that the worth depends on."""
        if self.eviction == "lru":
            return None
        return (
            tuple(self.uses[k]) if self.eviction == "lfu" else (self.uses[k][-1], trust_of(k), self.sizes[k])
        )


def sizes_of(keys: Sequence[ExpertKey]) -> list[int]:
    return [3 + k.expert % 4 for k in keys]


calls = st.lists(
    st.tuples(st.integers(0, 300), st.sets(st.integers(0, 11), min_size=1, max_size=5)), max_size=60
)


@pytest.mark.parametrize("eviction", EVICTIONS)
@given(steps=calls, budget=st.integers(6, 60))
def test_evicts_what_the_plain_reference_evicts(
    eviction: Eviction, steps: list[tuple[int, set[int]]], budget: int
) -> None:
    residency = Residency(budget, make_worth(eviction, trust_of))
    plain = PlainCache(budget, eviction)
    now = 0.0
    for passed, numbers in steps:
        now += passed
        keys = [key(number) for number in sorted(numbers)]
        for wave in residency.waves(sizes_of(keys)):
            part = keys[wave.start : wave.stop]
            exchange = residency.admit(part, sizes_of(part), now)
            plain.check(exchange.evict, part, sizes_of(part), now)
            assert residency.resident_bytes == sum(plain.sizes.values()) <= budget
            assert not set(exchange.evict) & set(part)
            assert {k for k in map(key, range(12)) if k in residency} == set(plain.sizes)


def test_a_use_counts_half_after_its_half_life() -> None:
    """Two uses a half-life ago are worth one now; three are worth more, and one is worth less."""
    worth = FrequencyWorth(10)
    for number, uses in ((1, 1), (2, 2), (3, 3)):
        for _ in range(uses):
            level = worth.of_use(key(number), 1, 0)
    levels = [worth.of_use(key(4), 1, 10)]
    worth = FrequencyWorth(10)
    worth.of_use(key(2), 1, 0)
    levels.append(worth.of_use(key(2), 1, 0))
    assert levels[0] == pytest.approx(levels[1])
    assert level > levels[0]


def test_decayed_counts_stay_exact_after_a_billion_steps() -> None:
    """Scaled counts would overflow; their logarithms still tell one use more from one less."""
    worth = FrequencyWorth(LFU_HALF_LIFE)
    order = EvictionOrder(worth)
    for number, uses in ((1, 3), (2, 2), (3, 4)):
        for use in range(uses):
            order.use(key(number), 1, 1e9 + use)
    assert [order.pop(()) for _ in range(3)] == [key(2), key(1), key(3)]


def test_equal_worth_goes_by_last_use() -> None:
    for eviction in EVICTIONS:
        order = EvictionOrder(make_worth(eviction))
        for number in (5, 1, 3):
            order.use(key(number), 1, 0)
        assert [order.pop(()) for _ in range(3)] == [key(5), key(1), key(3)]


def test_distrust_brings_an_expert_s_turn_forward_and_age_outweighs_it_in_the_end() -> None:
    def first_to_go(age_of_trusted: float) -> ExpertKey:
        order = EvictionOrder(make_worth("trust", lambda k: float(k.expert == 1)))
        order.use(key(1), 1, 0)
        order.use(key(2), 1, age_of_trusted)
        return order.pop(())

    horizon = WEIGHTS.horizon * WEIGHTS.distrust / WEIGHTS.recency
    assert first_to_go(0.9 * horizon) == key(2)
    assert first_to_go(1.1 * horizon) == key(1)


def test_trust_that_falls_is_seen_at_the_next_use() -> None:
    trust = {key(1): 1.0, key(2): 0.5, key(3): 0.4}
    order = EvictionOrder(make_worth("trust", trust.__getitem__))
    for number in (1, 2, 3):
        order.use(key(number), 1, 0)
    trust[key(1)] = 0.0
    order.use(key(1), 1, 0)
    assert [order.pop(()) for _ in range(3)] == [key(1), key(3), key(2)]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_books_do_not_grow_with_use(eviction: Eviction) -> None:
    """Trust that keeps falling enters the heap anew each time; it is thinned out."""
    trust = iter(range(10**6))
    order = EvictionOrder(make_worth(eviction, lambda k: -float(next(trust))))
    for step in range(5000):
        order.use(key(step % 10), 1, 0)
    assert len(order) == 10
    assert len(order._heap) <= 2 * 10 + 16
    assert len({order.pop(()) for _ in range(10)}) == 10


traces = st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3), max_size=9)


@given(calls=traces, capacity=st.integers(1, 4))
def test_belady_has_as_many_hits_as_the_best_of_all_choices(calls: list[set[int]], capacity: int) -> None:
    trace = [[key(number) for number in sorted(call)] for call in calls]
    waves = [call[i : i + capacity] for call in trace for i in range(0, len(call), capacity)]
    count = replay_belady(trace, capacity)
    assert count.hits == most_hits(waves, capacity)
    assert count.uses == sum(map(len, trace))
    for eviction in EVICTIONS:
        assert replay(trace, range(len(trace)), capacity, make_worth(eviction)).hits <= count.hits


def most_hits(waves: Sequence[Sequence[ExpertKey]], capacity: int) -> int:
    """Tries every set that could be kept after every wave."""
    best: dict[frozenset[ExpertKey], int] = {frozenset(): 0}
    for wave in waves:
        reached: dict[frozenset[ExpertKey], int] = {}
        for held, hits in best.items():
            hits += len(held & set(wave))
            others = held - set(wave)
            room = min(len(others), capacity - len(wave))
            for stay in combinations(sorted(others), room):
                after = frozenset(stay) | frozenset(wave)
                reached[after] = max(reached.get(after, 0), hits)
        best = reached
    return max(best.values())


def test_empty_trace_has_a_rate() -> None:
    assert replay_belady([], 3).hit_rate == 0.0
