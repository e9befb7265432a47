"""The byte budget's books."""

from __future__ import annotations

import random

import pytest

from experts.errors import BudgetTooSmall
from experts.eviction import EVICTIONS, Eviction, make_worth
from experts.residency import Residency
from extraction.manifest import ExpertKey


def _keys(*numbers: int) -> list[ExpertKey]:
    return [ExpertKey("model", 0, number) for number in numbers]


def test_least_recently_used_goes_first() -> None:
    residency = Residency(30)
    for number in (1, 2, 3):
        residency.admit(_keys(number), [10])
    residency.admit(_keys(1), [10])
    exchange = residency.admit(_keys(4), [10])
    assert exchange.evict == tuple(_keys(2))
    assert exchange.load == tuple(_keys(4))


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_use_of_what_is_there_counts_as_admitting_it(eviction: Eviction, seed: int) -> None:
    generator = random.Random(seed)
    admitted, used = (Residency(80, make_worth(eviction)) for _ in range(2))
    for now in range(60):
        wave = _keys(*sorted(generator.sample(range(12), 3)))
        sizes = [10] * len(wave)
        expected = admitted.admit(wave, sizes, now)
        if expected.load:
            assert used.admit(wave, sizes, now) == expected
        else:
            used.use(wave, sizes, now)


def test_a_wave_never_evicts_its_own_members() -> None:
    residency = Residency(30)
    residency.admit(_keys(1, 2, 3), [10, 10, 10])
    exchange = residency.admit(_keys(1, 4, 5), [10, 10, 10])
    assert set(exchange.evict) == set(_keys(2, 3))


def test_no_budget_keeps_everything_in_one_wave() -> None:
    residency = Residency(None)
    assert residency.waves([5, 6, 7]) == [range(3)]
    assert residency.admit(_keys(1, 2), [5, 6]).evict == ()


def test_waves_cover_everything_in_order_within_the_budget() -> None:
    sizes = [4, 4, 4, 9, 1, 10]
    waves = Residency(10).waves(sizes)
    assert [index for wave in waves for index in wave] == list(range(6))
    assert all(sum(sizes[index] for index in wave) <= 10 for wave in waves)


def test_budget_below_one_expert_is_refused_with_both_numbers() -> None:
    with pytest.raises(BudgetTooSmall, match="budget of 10 bytes is below one expert \\(11 bytes\\)"):
        Residency(10).waves([11])


def test_forgotten_expert_frees_its_bytes() -> None:
    residency = Residency(20)
    residency.admit(_keys(1, 2), [10, 10])
    residency.forget(_keys(1)[0])
    assert residency.resident_bytes == 10
    assert residency.admit(_keys(3), [10]).evict == ()


def test_expected_experts_enter_as_far_as_they_fit_beside_one_another() -> None:
    residency = Residency(30, make_worth("lru"))
    for number in (1, 2, 3):
        residency.admit(_keys(number), [10])
    exchange = residency.expect(_keys(9, 1, 8, 7), [10] * 4, most=4)
    assert (exchange.evict, exchange.load) == (tuple(_keys(2, 3)), tuple(_keys(9, 8)))
    assert residency.resident_bytes == 30


def test_no_more_than_asked_for_are_expected_and_none_evicts_another() -> None:
    residency = Residency(30)
    assert residency.expect(_keys(1, 2, 3), [10] * 3, most=2).load == tuple(_keys(1, 2))
    assert residency.expect(_keys(4), [31], most=2).load == (), "one that never fits is no error"
    assert Residency(None).expect(_keys(1, 2), [10, 10], most=2).load == tuple(_keys(1, 2))


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_expected_experts_go_before_used_ones_of_every_layer(eviction: Eviction) -> None:
    residency = Residency(30, make_worth(eviction))
    residency.admit(_keys(1), [10])
    residency.admit([ExpertKey("model", 1, 1)], [10])
    guess = ExpertKey("model", 2, 1)
    residency.expect([guess], [10], most=1)
    assert residency.admit(_keys(2), [10], now=1.0).evict == (guess,)


def test_expected_experts_go_first_until_they_are_used() -> None:
    residency = Residency(30)
    residency.admit(_keys(1), [10])
    residency.expect(_keys(2, 3), [10, 10], most=2)
    assert residency.admit(_keys(2), [10]).load == (), "it is there already"
    assert residency.admit(_keys(4), [10]).evict == tuple(_keys(3))
    assert residency.admit(_keys(5), [10], now=1.0).evict == tuple(_keys(1))


def test_smaller_budget_lets_the_least_worth_go_and_a_larger_one_nothing() -> None:
    residency = Residency(40)
    for number in (1, 2, 3, 4, 2):
        residency.admit(_keys(number), [10])
    assert residency.set_budget(25) == tuple(_keys(1, 3))
    assert (residency.resident_bytes, residency.budget_bytes) == (20, 25)
    assert residency.set_budget(40) == ()
    assert residency.admit(_keys(5, 6), [10, 10]).evict == ()


def test_budget_cannot_be_set_where_uses_were_not_counted() -> None:
    with pytest.raises(ValueError, match="nobody knows"):
        Residency(None).set_budget(10)


@pytest.mark.parametrize("seed", range(10))
def test_random_use_never_exceeds_the_budget(seed: int) -> None:
    chance = random.Random(seed)
    residency = Residency(100)
    held: dict[ExpertKey, int] = {}
    for _ in range(300):
        keys = _keys(*sorted(chance.sample(range(30), chance.randint(1, 8))))
        sizes = [5 + key.expert for key in keys]
        for wave in residency.waves(sizes):
            part, part_sizes = keys[wave.start : wave.stop], sizes[wave.start : wave.stop]
            exchange = residency.admit(part, part_sizes)
            for key in exchange.evict:
                del held[key]
            held |= {key: 5 + key.expert for key in exchange.load}
            assert set(part) <= set(held)
            assert residency.resident_bytes == sum(held.values()) <= 100
