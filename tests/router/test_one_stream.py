"""Many rows at once are routed and counted as one stream that decodes them would be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.eviction import EVICTIONS, Eviction
from router.choosing import ResidentChooser
from router.expert_facts import Residents
from router.one_stream import OneStream
from router.scoring import PRESETS, ExpertFacts, ScoreFactors
from router.step_routing import GateOutput

NUM_EXPERTS, K = 8, 2
NOBODY = Residents.of(frozenset(), NUM_EXPERTS)
WARM = replace(PRESETS["warm"], warmth=0.4)


def gate_of(logits_TE: torch.Tensor) -> GateOutput:
    return GateOutput(0, torch.zeros(len(logits_TE), 4), logits_TE, K, True)


def factors_of(warmth_E: torch.Tensor) -> ScoreFactors:
    even = torch.full((NUM_EXPERTS,), 0.5)
    return ScoreFactors(None, None, ExpertFacts(even, even, warmth_E))


def random_logits(seed: int, num_tokens: int = 40) -> torch.Tensor:
    return torch.randn(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eviction", EVICTIONS)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 40), capacity=st.integers(2, NUM_EXPERTS))
def test_steps_of_any_size_give_the_same_choices(
    eviction: Eviction, seed: int, cut: int, capacity: int
) -> None:
    logits_TE = random_logits(seed)
    whole, parts = (OneStream(NUM_EXPERTS, capacity, eviction, WARM, None) for _ in range(2))
    cold = torch.zeros(NUM_EXPERTS)
    expected = whole.choose(gate_of(logits_TE), logits_TE, factors_of(cold), K, NOBODY)
    found = [
        parts.choose(gate_of(part), part, factors_of(cold), K, NOBODY).routing.experts_TK
        for part in (logits_TE[:cut], logits_TE[cut:])
        if len(part)
    ]
    assert torch.equal(torch.cat(found), expected.routing.experts_TK)
    assert parts.counts == whole.counts


def test_one_row_at_a_time_it_chooses_as_the_service_does_with_what_is_resident() -> None:
    """The service's own chooser, told of what the stream's cache holds before every row."""
    stream = OneStream(NUM_EXPERTS, 3, "lru", WARM, None)
    held: list[int] = []
    for row in random_logits(5).split(1):
        residents = Residents.of(frozenset(held[-3:]), NUM_EXPERTS)
        factors = factors_of(residents.warmth_E)
        expected = ResidentChooser(WARM, None).choose(gate_of(row), row, factors, K, residents)
        found = stream.choose(gate_of(row), row, factors, K, NOBODY)
        assert torch.equal(found.routing.experts_TK, expected.routing.experts_TK)
        assert torch.equal(found.routing.weights_TK, expected.routing.weights_TK)
        assert torch.equal(found.missed_R, expected.missed_R)
        used = found.routing.experts_TK[0].tolist()
        held = [expert for expert in held if expert not in used] + used


def test_native_rows_are_counted_and_not_changed() -> None:
    stream = OneStream(NUM_EXPERTS, NUM_EXPERTS, "lfu", WARM, None)
    logits_TE = random_logits(1)
    choice = stream.choose(gate_of(logits_TE), logits_TE, None, K, NOBODY)
    assert torch.equal(choice.routing.experts_TK, gate_of(logits_TE).native().experts_TK)
    assert stream.counts.uses == 40 * K
    assert stream.counts.misses == len(choice.routing.experts_TK.unique()), "all of them stay"


def test_more_experts_a_token_than_stay_are_waves() -> None:
    stream = OneStream(NUM_EXPERTS, 1, "lru", WARM, None)
    logits_TE = random_logits(2)
    choice = stream.choose(gate_of(logits_TE), logits_TE, None, K, NOBODY)
    assert int(choice.missed_R.sum()) == stream.counts.misses
    assert stream.counts.misses >= 40 * (K - 1)
