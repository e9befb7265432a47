"""Tokens by the C source against the same in PyTorch, at every level: the same ones, whatever the rows hold."""

from __future__ import annotations

import math
import random

import pytest
import torch

from experts.native_products import LEVELS, library
from experts.numerics import computing_threads
from router.native_sampling import draw_rows
from router.request import SamplingParams
from router.sampling import WEIGHT_BITS, draw_rows_in_torch, weigh

ALMOST_ONE = 1 - 2.0**-53
SIZES = (1, 2, 3, 7, 8, 9, 50, 255, 256, 257, 1000, 1025, 4099)


def _levels() -> tuple[str, ...]:
    found = library()
    return () if found is None else LEVELS[: LEVELS.index(found.best_level) + 1]


pytestmark = pytest.mark.skipif(not _levels(), reason="no C compiler built the native products")


def _params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([1e-310, 1e-3, 0.2, 0.8, 1.0, 1.7, 100.0]),
        top_k=rng.choice([0, 0, 1, 5, 50, 1 << 30]),
        top_p=rng.choice([1.0, 1.0, 0.0, 0.5, 0.9, 0.999, 1 - 1e-9]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
    )


def _logits(rng: random.Random, num_rows: int, vocab_size: int) -> torch.Tensor:
    """With ties, and with rows that hold infinities or no numbers."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    dtype = rng.choice([torch.float32, torch.float64])
    scale = rng.choice([0.0, 0.1, 2.0, 8.0, 1e30])
    logits_SV = torch.randn(num_rows, vocab_size, generator=generator, dtype=dtype) * scale
    if rng.random() < 0.3:
        logits_SV = logits_SV.bfloat16().to(dtype)
    if rng.random() < 0.3:
        logits_SV[torch.rand(num_rows, vocab_size, generator=generator) < 0.5] = -math.inf
    if rng.random() < 0.3:
        logits_SV[0, rng.randrange(vocab_size)] = rng.choice([math.nan, math.inf])
    if rng.random() < 0.1:
        logits_SV[-1] = rng.choice([math.nan, math.inf, -math.inf])
    return logits_SV


@pytest.mark.parametrize("level", _levels())
@pytest.mark.parametrize("vocab_size", SIZES)
def test_tokens_are_those_of_pytorch(vocab_size: int, level: str) -> None:
    rng = random.Random(vocab_size)
    for _ in range(60):
        num_rows = rng.choice([1, 3, 16])
        logits_SV = _logits(rng, num_rows, vocab_size)
        params = [_params(rng) for _ in range(num_rows)]
        uniforms = [rng.choice([0.0, ALMOST_ONE, rng.random(), rng.random()]) for _ in range(num_rows)]
        expected = draw_rows_in_torch(logits_SV, params, uniforms)
        assert draw_rows(level, logits_SV, params, uniforms) == expected
        assert all(0 <= token < vocab_size for token in expected)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("level", _levels())
def test_tokens_of_a_large_vocabulary_are_those_of_pytorch(level: str, num_threads: int) -> None:
    rng = random.Random(5)
    logits_SV = torch.randn(12, 151936, generator=torch.Generator().manual_seed(5)) * 4
    params = [_params(rng) for _ in range(12)]
    uniforms = [rng.random() for _ in range(12)]
    with computing_threads(num_threads):
        expected = draw_rows_in_torch(logits_SV, params, uniforms)
        assert draw_rows(level, logits_SV, params, uniforms) == expected


def test_weights_are_those_of_the_softmax_to_the_nearest_unit() -> None:
    logits_SV = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * 5
    exponents_SV = (logits_SV.double() - logits_SV.double().amax(1, keepdim=True)) * (1 / 0.7)
    exact_SV = exponents_SV.exp() * 2.0**WEIGHT_BITS
    weights_SV = weigh(logits_SV, [1 / 0.7] * 3)
    assert weights_SV.amax(1).tolist() == [1 << WEIGHT_BITS] * 3
    assert ((weights_SV.double() - exact_SV).abs() <= 0.5 + exact_SV * 2.0**-46).all()


@pytest.mark.parametrize(
    "logits_SV", [torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(1, 16)[:, ::2], torch.zeros(2, 8)]
)
def test_rows_that_do_not_fit_are_refused(logits_SV: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="8"):
        draw_rows(_levels()[0], logits_SV, [SamplingParams()], [0.5])
