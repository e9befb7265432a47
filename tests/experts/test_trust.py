"""Trust stays in its bounds, grows with what is observed, halves when it says, and does not depend on who added it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from experts.errors import TrustMismatch
from experts.trust import (
    ASPECTS,
    CONVERGENCE,
    EFFICIENCY,
    MAX_DOUBLINGS,
    NUM_BUCKETS,
    UNSEEN,
    TrustSettings,
    TrustTable,
    aspect_scores,
    bucket_means,
    bucket_of,
    check_delta,
    empty_table,
    merged,
    moved,
    observe,
    observe_buckets,
    trust_scores,
)

SETTINGS = TrustSettings()
LAYERS = (0, 2)
NUM_EXPERTS = 4
CELLS = len(LAYERS) * NUM_EXPERTS
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)


def _observed(
    experts: list[int],
    values: list[float],
    weights: list[float],
    at: float,
    *,
    aspect: int = CONVERGENCE,
    clock: float = 0.0,
    settings: TrustSettings = SETTINGS,
) -> TrustTable:
    table = empty_table("model", LAYERS, NUM_EXPERTS, clock)
    observe(
        table, aspect, np.array(experts, dtype=np.int64), np.array(values), np.array(weights), at, settings
    )
    return replace(table, num_tokens=max(0, int(at - clock)))


@st.composite
def _deltas(draw: st.DrawFn) -> TrustTable:
    count = draw(st.integers(0, 6))
    experts = draw(arrays(np.int64, count, elements=st.integers(0, CELLS - 1)))
    values = draw(arrays(np.float64, count, elements=st.floats(0, 1)))
    weights = draw(arrays(np.float64, count, elements=st.floats(0, 100)))
    clock = draw(st.floats(0, 1e6))
    at = clock + draw(st.floats(0, 1e5))
    table = empty_table("model", LAYERS, NUM_EXPERTS, clock)
    observe(table, draw(st.integers(0, 2)), experts, values, weights, at, SETTINGS)
    observe_buckets(table, np.array([3, 3]), np.array(draw(st.tuples(*[st.floats(0, 20)] * 2))), at, SETTINGS)
    return replace(table, num_tokens=draw(st.integers(0, 10**6)))


def _assert_same(first: TrustTable, second: TrustTable) -> None:
    assert first.num_tokens == second.num_tokens
    assert np.array_equal(first.counts_ALE, second.counts_ALE)
    later = max(first.clock, second.clock)
    first, second = moved(first, later, SETTINGS), moved(second, later, SETTINGS)
    for name in ("sums_ALE", "weights_ALE", "bucket_sums_B", "bucket_weights_B"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-9, atol=1e-300)


def test_unseen_expert_has_one_half_in_everything() -> None:
    table = empty_table("model", LAYERS, NUM_EXPERTS)
    assert (aspect_scores(table, SETTINGS) == UNSEEN).all()
    np.testing.assert_allclose(trust_scores(table, SETTINGS), UNSEEN, rtol=1e-15)
    assert np.isnan(bucket_means([table], SETTINGS)).all()


@given(
    st.lists(st.tuples(st.integers(0, CELLS - 1), ANY_FLOAT, ANY_FLOAT), max_size=8),
    st.floats(0, 1e12),
    st.integers(0, len(ASPECTS) - 1),
)
def test_any_observation_leaves_scores_in_zero_to_one(
    rows: list[tuple[int, float, float]], at: float, aspect: int
) -> None:
    experts, values, weights = ([row[i] for row in rows] for i in range(3))
    weights = [min(float(weight), 1e12) for weight in weights]
    table = _observed(experts, values, weights, min(at, MAX_DOUBLINGS * 16384.0), aspect=aspect)  # type: ignore[arg-type]
    for scores in (aspect_scores(table, SETTINGS), trust_scores(table, SETTINGS)):
        assert np.isfinite(scores).all()
        assert scores.min() >= 0.0 and scores.max() <= 1.0


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.01, 1e3),
    st.integers(0, len(ASPECTS) - 1),
)
def test_better_observation_never_lowers_trust(low: float, high: float, weight: float, aspect: int) -> None:
    low, high = sorted((low, high))
    worse = trust_scores(_observed([5], [low], [weight], 10.0, aspect=aspect), SETTINGS)
    better = trust_scores(_observed([5], [high], [weight], 10.0, aspect=aspect), SETTINGS)
    assert better[1, 1] >= worse[1, 1]
    assert np.array_equal(np.delete(better, 5), np.delete(worse, 5)), "other experts are not concerned"


@pytest.mark.parametrize(("value", "is_above"), [(1.0, True), (0.0, False)])
def test_more_of_the_same_moves_trust_further(value: float, is_above: bool) -> None:
    scores = [
        trust_scores(_observed([0] * n, [value] * n, [1.0] * n, 0.0), SETTINGS)[0, 0] for n in (1, 2, 50)
    ]
    assert scores == sorted(scores, reverse=not is_above)
    assert (scores[0] > UNSEEN) == is_above


@pytest.mark.parametrize("aspect", range(len(ASPECTS)))
def test_observation_weighs_exactly_half_after_a_half_life(aspect: int) -> None:
    half_life = SETTINGS.half_lives[aspect]
    table = _observed([3], [1.0], [4.0], 1000.0, aspect=aspect, clock=1000.0)
    later = moved(table, 1000.0 + half_life, SETTINGS)
    assert later.weights_ALE[aspect, 0, 3] == 2.0
    assert later.sums_ALE[aspect, 0, 3] == 2.0
    assert moved(table, 1000.0 + 3 * half_life, SETTINGS).weights_ALE[aspect, 0, 3] == 0.5


def test_observation_a_half_life_after_the_clock_counts_twice_against_it() -> None:
    table = _observed([0], [0.0], [1.0], 0.0, aspect=EFFICIENCY)
    half_life = SETTINGS.half_lives[EFFICIENCY]
    observe(table, EFFICIENCY, np.array([0]), np.array([1.0]), np.array([1.0]), half_life, SETTINGS)
    assert table.sums_ALE[EFFICIENCY, 0, 0] / table.weights_ALE[EFFICIENCY, 0, 0] == 2 / 3


def test_trust_returns_to_one_half_when_nothing_is_observed_any_more() -> None:
    table = _observed([0], [1.0], [1000.0], 0.0)
    fresh = trust_scores(table, SETTINGS)[0, 0]
    old = trust_scores(replace(table, num_tokens=50 * 32768), SETTINGS)[0, 0]
    assert fresh > 0.69
    assert abs(old - UNSEEN) < 1e-9


@given(_deltas(), _deltas())
def test_merge_does_not_depend_on_the_order(first: TrustTable, second: TrustTable) -> None:
    _assert_same(merged(first, second, SETTINGS), merged(second, first, SETTINGS))


@given(_deltas(), _deltas(), _deltas())
def test_merge_does_not_depend_on_the_grouping(a: TrustTable, b: TrustTable, c: TrustTable) -> None:
    left = merged(merged(a, b, SETTINGS), c, SETTINGS)
    _assert_same(left, merged(a, merged(b, c, SETTINGS), SETTINGS))


@given(st.lists(st.tuples(st.integers(0, CELLS - 1), st.floats(0, 1), st.floats(0, 9)), max_size=12))
def test_merged_deltas_equal_one_table_that_saw_everything(rows: list[tuple[int, float, float]]) -> None:
    whole = empty_table("model", LAYERS, NUM_EXPERTS)
    parts = empty_table("model", LAYERS, NUM_EXPERTS)
    for index, (expert, value, weight) in enumerate(rows):
        at = 1000.0 * (index + 1)
        one = (np.array([expert]), np.array([value]), np.array([weight]))
        delta = empty_table("model", LAYERS, NUM_EXPERTS, 1000.0 * index)
        for table in (whole, delta):
            observe(table, CONVERGENCE, *one, at, SETTINGS)
        parts = merged(parts, replace(delta, num_tokens=1000), SETTINGS)
    _assert_same(parts, replace(whole, num_tokens=1000 * len(rows)))


def test_merge_of_other_experts_is_refused() -> None:
    with pytest.raises(TrustMismatch, match="trust is kept about"):
        merged(empty_table("model", (0,), 4), empty_table("model", (0,), 5), SETTINGS)


@pytest.mark.parametrize("name", ["sums_ALE", "weights_ALE", "bucket_sums_B", "bucket_weights_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_delta_that_no_observation_makes_is_refused(name: str, value: float) -> None:
    known = empty_table("model", LAYERS, NUM_EXPERTS)
    delta = _observed([0], [1.0], [1.0], 0.0)
    check_delta(delta, known)
    array = getattr(delta, name).copy()
    array.flat[0] = value
    with pytest.raises(TrustMismatch, match="out of range"):
        check_delta(replace(delta, **{name: array}), known)


def test_weights_of_the_aspects_are_proportions() -> None:
    table = _observed([0], [1.0], [8.0], 0.0)
    assert trust_scores(table, SETTINGS)[0, 0] == pytest.approx(0.5 + 0.4 * 0.25)
    alone = TrustSettings(weights=(7.0, 0.0, 0.0))
    assert trust_scores(table, alone)[0, 0] == pytest.approx(0.75)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": (0.0, 0.0, 0.0)},
        {"weights": (-1.0, 1.0, 1.0)},
        {"weights": (float("nan"), 1.0, 1.0)},
        {"half_lives": (0.0, 1.0, 1.0)},
        {"prior_weight": float("inf")},
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError):
        TrustSettings(**changes)  # type: ignore[arg-type]


def test_buckets_are_powers_of_two_of_the_rank() -> None:
    ids = np.array([0, 1, 2, 3, 6, 7, 151935, 2**40])
    assert bucket_of(ids).tolist() == [0, 1, 1, 2, 2, 3, 17, NUM_BUCKETS - 1]


def test_bucket_mean_is_the_mean_of_its_tokens() -> None:
    table = empty_table("model", LAYERS, NUM_EXPERTS)
    observe_buckets(table, np.array([2, 2, 5]), np.array([1.0, 3.0, 7.0]), 0.0, SETTINGS)
    assert bucket_means([table], SETTINGS)[[2, 5]].tolist() == [2.0, 7.0]
    later = empty_table("model", LAYERS, NUM_EXPERTS, SETTINGS.bucket_half_life)
    observe_buckets(later, np.array([2]), np.array([6.0]), later.clock, SETTINGS)
    assert bucket_means([table, later], SETTINGS)[[2, 5]].tolist() == [4.0, 7.0]
