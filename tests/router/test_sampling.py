"""Sampling: purity of the noise, the filters' order, and agreement with the distribution."""

from __future__ import annotations

import torch

from router.request import SamplingParams
from router.sampling import sample, uniform_noise


def _logits(size: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def test_zero_temperature_takes_the_best() -> None:
    logits = _logits()
    assert sample(logits, SamplingParams(temperature=0.0, seed=3), 5) == int(logits.argmax())


def test_noise_depends_on_seed_choice_and_position_only() -> None:
    assert uniform_noise(1, 2, 3) == uniform_noise(1, 2, 3)
    values = {
        uniform_noise(seed, choice, pos) for seed in (0, 2**64 - 1) for choice in (0, 1) for pos in (0, 9)
    }
    assert len(values) == 8
    assert all(0.0 <= value < 1.0 for value in values)


def test_noise_is_spread_evenly() -> None:
    values = torch.tensor([uniform_noise(7, 0, position) for position in range(4000)])
    counts = torch.histc(values, bins=10, min=0, max=1)
    assert counts.min() > 320 and counts.max() < 480


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = [sample(logits, SamplingParams(temperature=0.7, seed=1), position) for position in range(6000)]
    observed = torch.bincount(torch.tensor(drawn), minlength=4) / 6000
    torch.testing.assert_close(observed, torch.softmax(logits / 0.7, 0), atol=0.03, rtol=0)


def _support(params: SamplingParams, logits: torch.Tensor, draws: int = 3000) -> set[int]:
    return {sample(logits, params, position) for position in range(draws)}


def test_top_k_keeps_the_k_best() -> None:
    logits = torch.zeros(20)
    logits[3:7] = 1.0
    assert _support(SamplingParams(top_k=4, seed=2), logits) == {3, 4, 5, 6}


def test_top_p_keeps_the_shortest_prefix_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert _support(SamplingParams(top_p=0.8, seed=2), logits) == {0, 1}
    assert _support(SamplingParams(top_p=0.81, seed=2), logits) == {0, 1, 2}
    assert _support(SamplingParams(top_p=1e-9, seed=2), logits) == {0}


def test_top_p_is_applied_to_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert _support(SamplingParams(top_k=2, top_p=0.6, seed=2), logits) == {0, 1}
    assert _support(SamplingParams(top_k=2, top_p=0.5, seed=2), logits) == {0}


def test_min_p_is_relative_to_the_best() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert _support(SamplingParams(min_p=0.25, seed=2), logits) == {0, 1, 2}


def test_nucleus_of_a_flat_large_vocabulary_is_not_cut_by_the_prefilter() -> None:
    logits = torch.zeros(5000)
    assert max(_support(SamplingParams(top_p=0.99, seed=2), logits, 500)) > 2000
