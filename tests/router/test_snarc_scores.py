"""The snarc score against a plain loop, its presets, and what it leaves to the gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from router.errors import WeightsInvalid
from router.scoring import (
    PRESETS,
    ExpertFacts,
    ScoreFactors,
    SnarcWeights,
    read_weights,
    route_native,
    route_scored,
    score_terms,
)

T, E, K = 12, 16, 4


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertFacts]:
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    facts = ExpertFacts(uniform(E), uniform(E), (uniform(E) > 0.5).float())
    return torch.randn(T, E, generator=generator) * 3, uniform(T), uniform(T), facts


@pytest.mark.parametrize("weights", [*PRESETS.values(), SnarcWeights(1.0, 0.7, 0.0, 0.3)])
def test_score_equals_the_formula(weights: SnarcWeights) -> None:
    logits, surprise, reward, facts = _inputs()
    found = score_terms(logits, ScoreFactors(surprise, reward, facts), weights).total()
    for token in range(T):
        scale = float(logits[token].max() - logits[token].min()) if weights.is_scaled else 1.0
        for expert in range(E):
            expected = (
                weights.router * float(logits[token, expert]) / scale
                + weights.novelty * float(surprise[token]) * float(facts.novelty_E[expert])
                + weights.trust * float(reward[token]) * float(facts.trust_E[expert])
                + weights.warmth * float(facts.warmth_E[expert])
            )
            assert float(found[token, expert]) == pytest.approx(expected, abs=1e-5)


def test_seed_preset_is_the_seed_s_formula_on_raw_logits() -> None:
    seed = PRESETS["seed"]
    assert (seed.router, seed.novelty, seed.trust, seed.warmth) == (0.5, 0.2, 0.2, 0.1)
    assert not seed.is_scaled


def test_mixing_weights_stay_the_gate_s_own() -> None:
    logits, surprise, reward, facts = _inputs()
    score = score_terms(logits, ScoreFactors(surprise, reward, facts), SnarcWeights(0.1, 0, 0, 1.0)).total()
    probabilities = logits.softmax(-1)
    for normalise in (False, True):
        routing = route_scored(logits, score, K, normalise)
        expected = probabilities.gather(-1, routing.experts_TK)
        if normalise:
            expected = expected / expected.sum(-1, keepdim=True)
        assert torch.equal(routing.weights_TK, expected)


def test_gate_alone_chooses_as_native_routing_does() -> None:
    logits, surprise, reward, facts = _inputs()
    for is_scaled in (False, True):
        weights = SnarcWeights(0.5, 0.0, 0.0, 0.0, is_scaled=is_scaled)
        routing = route_scored(
            logits, score_terms(logits, ScoreFactors(surprise, reward, facts), weights).total(), K, True
        )
        native = route_native(logits, K, True)
        assert torch.equal(routing.experts_TK, native.experts_TK)
        torch.testing.assert_close(routing.weights_TK, native.weights_TK)


@pytest.mark.parametrize("keep_best", [1, 2, K, K + 3])
def test_best_experts_are_kept_at_the_first_ranks_whatever_the_scores(keep_best: int) -> None:
    logits, *_ = _inputs()
    routing = route_scored(logits, -logits, K, True, keep_best)
    best = logits.topk(min(keep_best, K)).indices
    assert torch.equal(routing.experts_TK[:, : best.shape[1]], best)
    if keep_best < K:
        worst = (-logits).topk(K - keep_best).indices
        assert torch.equal(routing.experts_TK[:, keep_best:], worst)


def test_logits_that_are_all_equal_are_scored() -> None:
    _, surprise, reward, facts = _inputs()
    score = score_terms(
        torch.full((T, E), 3.0), ScoreFactors(surprise, reward, facts), SnarcWeights()
    ).total()
    assert bool(torch.isfinite(score).all())


def test_weights_are_read_from_presets_and_pairs() -> None:
    assert read_weights("seed") == PRESETS["seed"]
    assert read_weights("warmth=0.3") == replace(PRESETS["thrifty"], warmth=0.3)
    expected = SnarcWeights(1.0, 0.0, 0.0, 0.2, keep_best=2, is_scaled=False)
    assert read_weights("warm,warmth=0.2,keep_best=2,is_scaled=false") == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("hot", "presets are scaled, seed, warm"),
        ("", "no preset"),
        ("warm,heat=1", "weights are router"),
        ("warmth=1,warmth=2", "twice"),
        ("warmth=nan", "from 0 to 100"),
        ("warmth=-1", "from 0 to 100"),
        ("warmth=many", "must be a number"),
        ("keep_best=1.5", "must be a number"),
        ("keep_best=9223372036854775808", "from 0 to 1024"),
        ("keep_best=-1", "from 0"),
        ("is_scaled=1", "true or false"),
    ],
)
def test_weights_out_of_range_are_refused(text: str, hint: str) -> None:
    with pytest.raises(WeightsInvalid, match=hint):
        read_weights(text)
