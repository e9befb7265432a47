"""Shadow caches: what they say is what a real cache with that eviction would have done."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.eviction import EVICTIONS, Eviction, make_worth
from experts.residency import Residency
from experts.shadow import SAMPLED_FROM, ShadowCaches
from extraction.manifest import ExpertKey


def trust_of(key: ExpertKey) -> float:
    return key.expert % 5 / 4


def follow(
    calls: Sequence[Sequence[ExpertKey]], budget: int, in_use: Eviction, num_layers: int = 1
) -> tuple[dict[Eviction, float], dict[Eviction, float]]:
    """Hit rates of real caches, and what the shadows beside the one in use say."""
    real = {eviction: Residency(budget, make_worth(eviction, trust_of)) for eviction in EVICTIONS}
    shadows = ShadowCaches(budget, 1, in_use, trust_of)
    hits = dict.fromkeys(EVICTIONS, 0)
    for index, call in enumerate(calls):
        step = index // num_layers
        for wave in real[in_use].waves([1] * len(call)):
            part = call[wave.start : wave.stop]
            ones = [1] * len(part)
            for eviction, cache in real.items():
                hits[eviction] += len(part) - len(cache.admit(part, ones, step).load)
            shadows.use(part, ones, step)
    uses = sum(map(len, calls))
    rates = {eviction: count / uses for eviction, count in hits.items()} if uses else {}
    return rates, shadows.hit_rates(uses, hits[in_use])


numbers = st.sets(st.integers(0, 15), min_size=1, max_size=6)


@pytest.mark.parametrize("in_use", EVICTIONS)
@given(calls=st.lists(numbers, max_size=40), budget=st.integers(1, 12))
def test_small_budgets_are_followed_exactly(in_use: Eviction, calls: list[set[int]], budget: int) -> None:
    keys = [[ExpertKey("model", 0, number) for number in sorted(call)] for call in calls]
    real, told = follow(keys, budget, in_use)
    assert told == pytest.approx(real)
    assert list(told.values()) == sorted(told.values(), reverse=True), "best first"


def test_a_sample_tells_how_evictions_differ() -> None:
    """2,048 experts of skewed use, a quarter of them in the budget: within three points of the truth."""
    chance = random.Random(0)
    ranks = [chance.sample(range(128), 128) for _ in range(16)]
    weights = [[(1 + rank) ** -0.7 for rank in layer] for layer in ranks]
    calls = []
    for index in range(4000):
        drawn = sorted(set(chance.choices(range(128), weights[index % 16], k=8)))
        calls.append([ExpertKey("model", index % 16, expert) for expert in drawn])
    assert SAMPLED_FROM <= 512
    real, told = follow(calls, 512, "lfu", num_layers=16)
    assert told["lfu"] == real["lfu"]
    assert real["lfu"] - real["lru"] > 0.05, "the traffic must tell evictions apart"
    assert told == pytest.approx(real, abs=0.03)


def test_shadows_follow_a_budget_that_changes() -> None:
    chance = random.Random(1)
    real = {eviction: Residency(12, make_worth(eviction, trust_of)) for eviction in EVICTIONS}
    shadows = ShadowCaches(12, 1, "lfu", trust_of)
    uses, hits = 0, dict.fromkeys(EVICTIONS, 0)
    for step in range(300):
        if step % 50 == 49:
            for cache in real.values():
                cache.set_budget(4 + step % 9)
            shadows.set_budget(4 + step % 9)
        call = [ExpertKey("model", 0, number) for number in sorted(chance.sample(range(16), 4))]
        ones = [1] * len(call)
        uses += len(call)
        for eviction, cache in real.items():
            hits[eviction] += len(call) - len(cache.admit(call, ones, step).load)
        shadows.use(call, ones, step)
    assert shadows.hit_rates(uses, hits["lfu"]) == pytest.approx({name: n / uses for name, n in hits.items()})


def test_a_sample_survives_a_budget_of_less_than_one_expert_each() -> None:
    shadows = ShadowCaches(SAMPLED_FROM * 10, 10, "lfu")
    call = [ExpertKey("model", 0, number) for number in range(512)]
    shadows.use(call, [10] * 512, 0)
    shadows.set_budget(10)
    shadows.use(call, [10] * 512, 1)
    assert min(shadows.hit_rates(1024, 10).values()) >= 0.0


def test_nothing_used_tells_nothing() -> None:
    assert ShadowCaches(10, 1, "lfu").hit_rates(0, 0) == {}
