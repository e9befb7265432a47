"""Sampling: purity of the noise, the filters' order, and agreement with the distribution."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import router.sampling
from experts.native_products import chosen_level
from experts.numerics import computing_threads
from router.request import SamplingParams
from router.sampling import PREFILTER, sample, sample_rows, uniform_noise


@pytest.fixture(params=["native", "torch"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds of both ways to draw."""
    level = chosen_level(torch.float32) if request.param == "native" else None
    if request.param == "native" and level is None:
        pytest.skip("this process has PyTorch's products")
    monkeypatch.setattr(router.sampling, "_level", lambda: level)


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


def _drawn_alone(logits_V: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The distribution's definition, in floating point: where a number falls between two tokens, it may be rounded to
    the other one, which takes a number in some 10^12."""
    wide = logits_V.double()
    cumulative = torch.softmax((wide - wide.max()) / params.temperature, dim=-1).cumsum(0)
    uniform = uniform_noise(params.seed, params.choice, position)
    found = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return min(found, logits_V.numel() - 1)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 7), (3, 50), (64, 4099), (16, 40960), (2, 151936)])
def test_rows_drawn_together_get_the_tokens_that_they_get_alone(
    num_rows: int, vocab_size: int, num_threads: int
) -> None:
    logits_SV = _logits(num_rows * vocab_size, seed=num_rows).view(num_rows, vocab_size)
    logits_SV[0, vocab_size // 2 :] = float("-inf")
    temperatures = (1e-3, 0.2, 0.8, 1.0, 1.7)
    params = [SamplingParams(temperature=temperatures[row % 5], seed=row * 977) for row in range(num_rows)]
    with computing_threads(num_threads):
        for first in range(0, 40, 4):
            positions = range(first, first + num_rows)
            together = sample_rows(logits_SV, params, positions)
            assert together == list(map(sample, logits_SV, params, positions))
            assert together == list(map(_drawn_alone, logits_SV, params, positions))


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


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.6, top_k=7, top_p=0.9, min_p=0.05),
        SamplingParams(temperature=1.7, top_p=0.7, min_p=0.1),
        SamplingParams(temperature=1.3, top_k=12, min_p=0.2),
        SamplingParams(temperature=2.0, top_k=30, top_p=0.5),
        SamplingParams(temperature=0.3, min_p=1.0),
        SamplingParams(top_p=0.0),
        SamplingParams(top_k=100),
    ],
)
def test_filters_keep_what_transformers_keeps(params: SamplingParams) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    for seed in range(3):
        logits = _logits(40, seed)
        published = torch.softmax(warpers(torch.zeros(1, 1), logits.unsqueeze(0))[0], 0)
        drawn = [sample(logits, params, position) for position in range(1500)]
        observed = torch.bincount(torch.tensor(drawn), minlength=40) / 1500
        assert set(drawn) <= set(published.nonzero().flatten().tolist())
        torch.testing.assert_close(observed, published, atol=0.05, rtol=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-12, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_temperature_near_zero_takes_the_best(temperature: float, scale: float) -> None:
    logits = _logits(2000) * scale
    for filters in ({}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}):
        params = SamplingParams(temperature=temperature, **filters)  # type: ignore[arg-type]
        assert {sample(logits, params, position) for position in range(5)} == {int(logits.argmax())}


def test_best_of_equals_is_the_first() -> None:
    """As argmax takes it in transformers; bfloat16 heads make equal logits often."""
    logits = torch.zeros(40000)
    logits[[7, 35001]] = 2.0
    assert sample(logits, SamplingParams(temperature=0.0), 0) == 7


@pytest.mark.parametrize("size", [PREFILTER - 1, PREFILTER, PREFILTER + 1])
@pytest.mark.parametrize("top_p", [0.5, 0.999, 1 - 1e-9])
def test_nucleus_is_the_same_on_both_sides_of_the_prefilter(size: int, top_p: float) -> None:
    """A token of no weight more does not change what is drawn."""
    logits = torch.full((PREFILTER + 1,), -1e4)
    logits[: PREFILTER - 1] = _logits(PREFILTER - 1)
    params = SamplingParams(top_p=top_p, seed=4)
    for position in range(200):
        assert sample(logits[:size], params, position) == sample(logits, params, position)


def test_lower_one_of_equal_tokens_is_kept() -> None:
    logits = torch.zeros(3000)
    logits[2000:] = 1.0
    assert _support(SamplingParams(top_k=3, seed=2), logits, 100) == {2000, 2001, 2002}
    assert _support(SamplingParams(top_p=1e-4, seed=2), logits, 20) == {2000}


def test_vocabulary_with_more_tokens_than_weights_can_be_summed_of_is_refused() -> None:
    with pytest.raises(ValueError, match="1048576"):
        sample(torch.zeros(1 << 20), SamplingParams(), 0)


def test_number_of_threads_changes_no_token() -> None:
    logits = _logits(40000)
    before = torch.get_num_threads()
    drawn = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            for params in (SamplingParams(), SamplingParams(top_p=0.95), SamplingParams(min_p=0.01)):
                drawn.append([sample(logits, params, position) for position in range(6)])
    finally:
        torch.set_num_threads(before)
    assert drawn[:3] == drawn[3:]


def test_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.full((300,), -1e30)
    logits[150] = 3e38
    assert _support(SamplingParams(), logits, 200) == {150}
