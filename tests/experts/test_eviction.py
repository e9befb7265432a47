"""Evictions against a slow, plain reference that looks at every resident expert at every eviction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, islice

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
        self.visits: list[tuple[int, float]] = []
        """Layer and step, each pair once."""

    def check(
        self, evicted: Sequence[ExpertKey], wave: Sequence[ExpertKey], sizes: Sequence[int], now: float
    ) -> None:
        """Each must be of lowest worth, but for rounding, and of those exactly alike the one used longest ago; there
        must be as many as room is needed for, and no more."""
        for layer in dict.fromkeys(k.layer for k in wave):
            if (layer, now) not in self.visits:
                self.visits.append((layer, now))
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
        turn, way = self.turn_and_way(k.layer, now)
        if self.eviction == "lfu":
            count = sum(2.0 ** ((use - turn) / LFU_HALF_LIFE) for use in self.uses[k])
            steps = {step for _, step in self.visits if step <= turn}
            share = min(1.0, count / sum(2.0 ** ((step - turn) / LFU_HALF_LIFE) for step in steps))
            return -math.log2(1.0 / share - 1.0 + way)
        age = (turn - self.uses[k][-1] + way) / WEIGHTS.horizon
        size = self.sizes[k] / WEIGHTS.size_unit
        return -(WEIGHTS.recency * age + WEIGHTS.distrust * (1 - trust_of(k)) + WEIGHTS.size * size)

    def turn_and_way(self, layer: int, now: float) -> tuple[float, float]:
        """The layer's last turn, and the part of a round until its next one: layers come in the order of their last
        visits, and one that was left out has had its turn with the others."""
        layers = [visited for visited, _ in self.visits]
        since = len(layers) - 1 - max(i for i, visited in enumerate(layers) if visited == layer)
        num_layers = len(set(layers))
        is_done = (layer, now) in self.visits
        turn = now if is_done else max(step for _, step in self.visits if step < now)
        return turn, max(1, num_layers - since) / num_layers

    def facts(self, k: ExpertKey) -> object:
        """All that the worth depends on."""
        if self.eviction == "lru":
            return None
        if self.eviction == "lfu":
            return (k.layer, tuple(self.uses[k]))
        return (k.layer, self.uses[k][-1], trust_of(k), self.sizes[k])


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
    for number, uses in ((3, 3), (6, 2), (9, 4)):
        for _ in range(uses):
            order.use(key(number), 1, 1e9)
    assert pops(order, 3) == [key(6), key(3), key(9)]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_of_one_layer_equal_worth_goes_by_last_use(eviction: Eviction) -> None:
    order = EvictionOrder(make_worth(eviction))
    for number in (6, 0, 3):
        order.use(key(number), 1, 0)
    assert pops(order, 3) == [key(6), key(0), key(3)]


@pytest.mark.parametrize(("eviction", "first"), [("lru", 1), ("lfu", 0), ("trust", 0)])
def test_between_layers_equal_worth_goes_by_how_far_the_next_turn_is(eviction: Eviction, first: int) -> None:
    """Layers 0, 1, 2, 0: next come 1, 2 and 0, in this order."""
    order = EvictionOrder(make_worth(eviction))
    for step in range(3):
        for number in (0, 1, 2):
            order.use(key(number), 1, step)
    order.use(key(0), 1, 3)
    assert next(order.going(())) == key(first)


@pytest.mark.parametrize("eviction", ["lfu", "trust"])
def test_a_loop_that_does_not_fit_keeps_nearly_what_belady_keeps(eviction: Eviction) -> None:
    """Every step needs every expert of six layers, and half of them fit: by recency alone every use would miss."""
    calls = [[ExpertKey("model", layer, number) for number in range(16)] for layer in range(6)] * 40
    steps = [index // 6 for index in range(len(calls))]
    best = replay_belady(calls, 48).hit_rate
    assert replay(calls, steps, 48, make_worth("lru")).hit_rate == 0.0
    assert best > 0.35
    assert replay(calls, steps, 48, make_worth(eviction)).hit_rate > 0.95 * best


def test_experts_of_a_component_that_is_no_longer_used_go_first() -> None:
    order = EvictionOrder(make_worth("lfu"))
    talker = [ExpertKey("talker", 0, number) for number in range(4)]
    for step in range(100):
        for expert in [*(talker if step < 20 else []), key(step % 9), key(20)]:
            order.use(expert, 1, step)
    assert set(pops(order, 4)) == set(talker)


def pops(order: EvictionOrder, num_experts: int) -> list[ExpertKey]:
    return list(islice(order.going(()), num_experts))


def test_distrust_brings_an_expert_s_turn_forward_and_age_outweighs_it_in_the_end() -> None:
    def first_to_go(age_of_trusted: float) -> ExpertKey:
        order = EvictionOrder(make_worth("trust", lambda k: float(k.expert == 1)))
        order.use(key(1), 1, 0)
        order.use(key(4), 1, age_of_trusted)
        return next(order.going(()))

    horizon = WEIGHTS.horizon * WEIGHTS.distrust / WEIGHTS.recency
    assert first_to_go(0.9 * horizon) == key(4)
    assert first_to_go(1.1 * horizon) == key(1)


def test_trust_that_falls_is_seen_at_the_next_use() -> None:
    trust = {key(1): 1.0, key(2): 0.5, key(3): 0.4}
    order = EvictionOrder(make_worth("trust", trust.__getitem__))
    for number in (1, 2, 3):
        order.use(key(number), 1, 0)
    trust[key(1)] = 0.0
    order.use(key(1), 1, 0)
    assert pops(order, 3) == [key(1), key(3), key(2)]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_books_do_not_grow_with_use(eviction: Eviction) -> None:
    """Trust that keeps falling enters the heap anew each time; it is thinned out."""
    trust = iter(range(10**6))
    order = EvictionOrder(make_worth(eviction, lambda k: -float(next(trust))))
    for step in range(5000):
        order.use(ExpertKey("model", 0, step % 10), 1, 0)
    assert len(order) == 10
    assert len(order._layers["model", 0].heap) <= 2 * 10 + 16
    assert len(set(pops(order, 11))) == 10


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
