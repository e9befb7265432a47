"""Expected uses from nothing, from counts, and from the trust ledger."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.demand import PRIOR_TOKENS, Demand, counted_demand, layer_counts, trust_counts, uniform_demand
from experts.trust import EFFICIENCY, TrustSettings, empty_table, observe
from extraction.manifest import ExpertKey

KEYS = [ExpertKey("model", layer, expert) for layer in (0, 2) for expert in range(4)]
SIZES = dict.fromkeys(KEYS, 10)


def test_without_knowledge_a_layers_experts_are_used_alike() -> None:
    assert set(uniform_demand(SIZES, 2, 8).uses.values()) == {0.5}


def test_counts_become_uses_that_add_up_to_the_experts_per_token() -> None:
    counts = {KEYS[0]: 3000.0, KEYS[1]: 1000.0}
    demand = counted_demand(SIZES, counts, 2, 8)
    layer = [demand.uses[key] for key in KEYS[:4]]
    assert sum(layer) == pytest.approx(2.0)
    assert layer[0] > layer[1] > layer[2] == layer[3] > 0.0
    assert [demand.uses[key] for key in KEYS[4:]] == [0.5] * 4


def test_many_counts_outweigh_the_prior() -> None:
    tokens = 1e6 * PRIOR_TOKENS
    demand = counted_demand(SIZES, {KEYS[0]: tokens, KEYS[1]: tokens}, 2, 8, {(KEYS[0], KEYS[1]): tokens})
    assert demand.uses[KEYS[0]] == pytest.approx(1.0, abs=1e-5)
    assert demand.together[KEYS[0], KEYS[1]] == pytest.approx(1.0, abs=1e-5)


def test_trust_ledger_tells_how_often_experts_were_used() -> None:
    table = empty_table("model", (0, 2), 4)
    settings = TrustSettings()
    observe(table, EFFICIENCY, np.array([1, 6]), np.array([0.5, 0.1]), np.array([3.0, 5.0]), 0.0, settings)
    counts = trust_counts(table)
    assert {key: count for key, count in counts.items() if count} == {KEYS[1]: 3.0, KEYS[6]: 5.0}


def test_trace_counts_have_a_row_for_every_layer() -> None:
    counts = layer_counts(np.array([[1, 0], [0, 2]]), "model")
    assert counts[ExpertKey("model", 1, 1)] == 2.0
    assert len(counts) == 4


@pytest.mark.parametrize("use", [-0.1, float("inf"), float("nan")])
def test_impossible_uses_are_refused(use: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Demand({KEYS[0]: 1}, {KEYS[0]: use}, 8)


def test_uses_of_other_experts_than_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="other experts"):
        Demand({KEYS[0]: 1}, {KEYS[1]: 0.5}, 8)
