"""The codec's activation by our own source, at every level that the processor has.

Tolerance against float64: some units in the last place of what goes in, which grows with the number of waves.
"""

from __future__ import annotations

import math

import pytest
import torch

from experts.native_products import LEVELS, library
from experts.numerics import computing_threads
from router.speech.native_snake import snake_rows

FOUND = library()
OURS = () if FOUND is None else LEVELS[: LEVELS.index(FOUND.best_level) + 1]
pytestmark = pytest.mark.skipif(FOUND is None, reason="our own products were not built")


def vectors(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    bias, alpha, beta = torch.randn(3, width, generator=generator).unbind()
    return bias, alpha.exp(), beta.exp()


@pytest.mark.parametrize("level", OURS)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_waves_are_close_to_exact_ones(level: str, spread: float) -> None:
    x = torch.randn(70, 96, generator=torch.Generator().manual_seed(1)) * spread
    bias, frequency, magnitude = vectors(96)
    found = snake_rows(level, x, bias, frequency, magnitude, torch.float32)
    y = (x + bias).double()
    expected = y + torch.sin(y * frequency.double()).square() * magnitude.double()
    rounding = 2.0**-23 * ((y * frequency.double()).abs() * magnitude + magnitude + expected.abs())
    assert ((found - expected).abs() <= 2 * rounding).all()


@pytest.mark.parametrize("level", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 96, 100])
def test_row_has_its_bits_in_any_company(level: str, dtype: torch.dtype, width: int) -> None:
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(2)).mul_(5.0).to(dtype)
    whole = snake_rows(level, x, *vectors(width), dtype)
    for first, last in ((0, 1), (3, 68), (299, 300), (7, 300)):
        with computing_threads(3):
            assert torch.equal(snake_rows(level, x[first:last], *vectors(width), dtype), whole[first:last])
    for channel in {0, width - 1}:
        alone = snake_rows(
            level, x[:, channel : channel + 1], *(v[channel : channel + 1] for v in vectors(width)), dtype
        )
        assert torch.equal(alone[:, 0], whole[:, channel])


@pytest.mark.parametrize("level", OURS)
def test_rounding_comes_last(level: str) -> None:
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    wide = snake_rows(level, x, *vectors(96), torch.float32)
    assert torch.equal(snake_rows(level, x, *vectors(96), torch.bfloat16), wide.bfloat16())
    assert torch.equal(snake_rows(level, x.float(), *vectors(96), torch.float32), wide)


@pytest.mark.parametrize("level", OURS)
def test_what_is_no_number_or_far_away_is_no_trap(level: str) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0]])
    flat = torch.zeros(6), torch.ones(6), torch.ones(6)
    found = snake_rows(level, x, *flat, torch.float32)[0]
    assert found[:3].isnan().all()
    assert found[3:].tolist() == x[0, 3:].tolist()


def test_tensors_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="expected"):
        snake_rows(OURS[-1], x, *vectors(7), torch.float32)
    with pytest.raises(ValueError, match="no waves"):
        snake_rows(OURS[-1], x, *vectors(8), torch.float16)
