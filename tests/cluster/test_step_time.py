"""The expected time of a layer's slowest process, against drawing lots."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.layer_work import water_level
from cluster.step_time import expected_slowest, is_called


@pytest.mark.parametrize(
    ("hops", "units", "means", "most"),
    [
        ([0.0], [1.0], [2.5], [8]),
        ([0.0, 0.3], [1.0, 0.5], [2.0, 3.0], [8, 8]),
        ([0.0, 5.0, 5.0], [0.1, 0.1, 0.2], [7.0, 0.5, 0.5], [8, 8, 8]),
        ([0.2] * 16, [1.0] * 16, [0.5] * 16, [4] * 16),
    ],
)
def test_expected_slowest_agrees_with_random_draws(
    hops: list[float], units: list[float], means: list[float], most: list[int]
) -> None:
    random = np.random.default_rng(0)
    draws_NB = random.binomial(most, np.array(means) / most, size=(200_000, len(hops)))
    times_NB = np.where(draws_NB > 0, np.array(hops) + draws_NB * np.array(units), 0.0)
    drawn = times_NB.max(axis=1).mean()
    assert expected_slowest(hops, units, means, most) == pytest.approx(drawn, rel=0.01)


def test_what_is_certain_takes_its_time_and_what_is_never_asked_none() -> None:
    assert expected_slowest([0.5], [2.0], [3.0], [3]) == pytest.approx(6.5)
    assert expected_slowest([0.5], [2.0], [0.0], [3]) == 0.0
    assert expected_slowest([], [], [], []) == 0.0


@pytest.mark.parametrize(
    ("num_experts", "per_token", "held"), [(8, 2, 2), (64, 8, 16), (128, 8, 128), (5, 5, 1)]
)
def test_call_probability_is_that_of_drawing_without_replacement(
    num_experts: int, per_token: int, held: int
) -> None:
    exact = 1 - math.comb(num_experts - held, per_token) / math.comb(num_experts, per_token)
    share = held * per_token / num_experts
    assert is_called(share, per_token, num_experts) == pytest.approx(exact)
    assert is_called(share, per_token, num_experts, 3) == pytest.approx(1 - (1 - exact) ** 3)


def test_water_level_leaves_out_machines_that_are_too_far_away() -> None:
    assert water_level(10.0, np.array([0.0, 1.0]), np.array([1.0, 1.0])) == pytest.approx(5.5)
    assert water_level(10.0, np.array([0.0, 99.0]), np.array([1.0, 1.0])) == pytest.approx(10.0)
    assert water_level(10.0, np.array([]), np.array([])) == 0.0
