"""What a trace says, against the slow way of counting."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from experts.eviction import make_worth
from experts.replay import replay
from router.trace_file import TraceFacts
from router.trace_reader import RoutingTable
from router.trace_statistics import (
    busier_half,
    coactivation,
    decode_calls,
    miss_curves,
    moe_layers,
    use_counts,
    use_entropy,
)

NUM_TOKENS, NUM_EXPERTS = 60, 6


@pytest.fixture
def table() -> RoutingTable:
    """Two requests in layers 0 and 2 of three, layer after layer as an engine routes; some tokens have one expert."""
    random = np.random.default_rng(3)
    rows = [(r, p, layer) for layer in (0, 2) for r in (0, 1) for p in range(NUM_TOKENS // 2)]
    experts = np.array([random.permutation(NUM_EXPERTS)[:2] for _ in rows], dtype=np.int16)
    experts[::7, 1] = -1
    requests, positions, layers = np.array(rows, dtype=np.int32).T
    facts = TraceFacts("0" * 64, "model", "native", 3, NUM_EXPERTS, 2, "cpu/test", "1.0")
    weights = np.ones_like(experts, dtype=np.float32)
    return RoutingTable(facts, ("a", "b"), requests, positions, layers.astype(np.int16), experts, weights)


def test_uses_are_counted_by_layer_and_expert(table: RoutingTable) -> None:
    expected = Counter(
        (int(layer), expert)
        for layer, chosen in zip(table.layers_N, table.experts_NK.tolist(), strict=True)
        for expert in chosen
        if expert >= 0
    )
    counts = use_counts(table)
    assert counts.shape == (3, NUM_EXPERTS)
    assert {tuple(place): counts[tuple(place)] for place in np.argwhere(counts).tolist()} == dict(expected)
    assert moe_layers(table) == [0, 2]


def test_entropy_is_one_for_even_use_and_zero_for_a_single_expert() -> None:
    counts = np.array([[5, 5, 5, 5], [0, 20, 0, 0], [0, 0, 0, 0], [1, 1, 2, 0]])
    expected = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5)) / math.log(4)
    assert use_entropy(counts).tolist() == pytest.approx([1.0, 0.0, 0.0, expected])
    assert busier_half(counts).tolist() == pytest.approx([0.5, 1.0, 0.0, 0.75])


def test_experts_that_always_come_together_stand_out(table: RoutingTable) -> None:
    experts = np.array([[0, 1], [2, 3]] * 30, dtype=np.int16)
    ratio = coactivation(_layer_of(table, experts), 0)
    assert ratio[0, 1] > 3 and ratio[2, 3] > 3
    assert ratio[0, 2] == 0
    assert math.isnan(ratio[0, 0]) and math.isnan(ratio[0, 5]), (
        "an expert with itself, and one that was never used"
    )


def test_experts_chosen_by_chance_stand_near_one(table: RoutingTable) -> None:
    random = np.random.default_rng(5)
    experts = np.array([random.permutation(NUM_EXPERTS)[:2] for _ in range(20000)], dtype=np.int16)
    ratio = coactivation(_layer_of(table, experts), 0)
    off_diagonal = ratio[~np.eye(NUM_EXPERTS, dtype=bool)]
    # Drawn without replacement, a pair comes E / (E - 1) times as often: little for real numbers of experts.
    assert off_diagonal == pytest.approx(1.2, rel=0.1)


def test_calls_are_in_the_order_of_decode_and_count_a_token_once(table: RoutingTable) -> None:
    again = np.concatenate((np.arange(len(table.layers_N)), np.arange(5)))
    calls, steps = decode_calls(_rows(table, again), max_tokens=1000)
    places = list(zip(table.requests_N, table.positions_N, table.layers_N, strict=True))
    order = sorted(range(len(places)), key=lambda row: tuple(map(int, places[row])))
    assert [[key.expert for key in call] for call in calls] == [
        [expert for expert in table.experts_NK[row].tolist() if expert >= 0] for row in order
    ]
    assert [call[0].layer for call in calls] == [int(table.layers_N[row]) for row in order]
    assert steps == [float(token) for token in range(NUM_TOKENS) for _ in range(2)]


def test_first_tokens_are_taken_whole(table: RoutingTable) -> None:
    calls, steps = decode_calls(table, max_tokens=7)
    assert len(calls) == 14 and max(steps) == 6.0


def test_curves_fall_to_the_first_loads_and_none_beats_the_optimum(table: RoutingTable) -> None:
    shares = (0.1, 0.3, 0.6, 1.0)
    curves = {curve.eviction: curve.miss_rates for curve in miss_curves(table, shares, 1000)}
    assert curves.keys() == {"lru", "lfu", "belady"}
    calls, steps = decode_calls(table, 1000)
    uses = sum(map(len, calls))
    for rates in curves.values():
        assert rates[-1] == pytest.approx(2 * NUM_EXPERTS / uses), "with room for all, each is loaded once"
        assert all(best <= rate for best, rate in zip(curves["belady"], rates, strict=True))
    assert curves["lru"][1] == 1.0 - replay(calls, steps, 4, make_worth("lru")).hit_rate


def _layer_of(table: RoutingTable, experts_NK: np.ndarray) -> RoutingTable:
    count = len(experts_NK)
    zeros = np.zeros(count, dtype=np.int32)
    return RoutingTable(
        table.facts, ("a",), zeros, np.arange(count, dtype=np.int32), zeros.astype(np.int16), experts_NK,
        np.ones_like(experts_NK, dtype=np.float32),
    )  # fmt: skip


def _rows(table: RoutingTable, rows: np.ndarray) -> RoutingTable:
    return RoutingTable(
        table.facts, table.names, table.requests_N[rows], table.positions_N[rows], table.layers_N[rows],
        table.experts_NK[rows], table.weights_NK[rows],
    )  # fmt: skip
