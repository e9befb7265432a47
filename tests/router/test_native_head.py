"""Norm, head and the likeliest token in one call: bit by bit what one call for each gives."""

from __future__ import annotations

import pytest
import torch

from experts.native_products import LEVELS, float_matrix, library, multiply
from router.native_attention import norm_rows
from router.native_head import NativeHead

BUILT = library()
if BUILT is None:
    pytest.skip("native products are not built here", allow_module_level=True)
LEVELS_HERE = LEVELS[: LEVELS.index(BUILT.best_level) + 1]
EPS = 1e-6


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "outputs", "width"), [(1, 1, 34), (3, 533, 64), (20, 70, 130)])
def test_logits_have_the_bits_of_norm_and_product(
    level: str, dtype: torch.dtype, num_rows: int, outputs: int, width: int
) -> None:
    hidden, norm = _random(num_rows, width, dtype=dtype), _random(width, dtype=dtype, seed=1)
    matrix = _random(outputs, width, dtype=dtype, seed=2)
    head = NativeHead.of(level, norm, matrix, EPS)
    assert head is not None
    logits, best = head.logits(hidden)
    expected = multiply(level, norm_rows(level, hidden, norm, EPS), float_matrix(matrix)).float()
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)
    assert best == [row.index(max(row)) for row in expected.tolist()]


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_row_with_a_logit_that_is_not_finite_has_no_likeliest_token(level: str, bad: float) -> None:
    for place in (0, 17, 36):
        matrix = torch.ones(37, 8)
        matrix[place] = bad
        head = NativeHead.of(level, torch.ones(8), matrix, EPS)
        assert head is not None
        assert head.logits(torch.ones(2, 8))[1] == [-1, -1]


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_of_equal_logits_the_first_is_the_likeliest(level: str) -> None:
    matrix = torch.zeros(40, 8)
    matrix[[11, 33]] = 1.0
    head = NativeHead.of(level, torch.ones(8), matrix, EPS)
    assert head is not None
    assert head.logits(torch.ones(1, 8))[1] == [11]
    with pytest.raises(ValueError, match="expected"):
        head.logits(torch.ones(1, 9))
