"""Our own routing: against a plain reference, and bit by bit against itself, at every level here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.native_products import LEVELS, library
from router.native_routing import route_rows
from router.scoring import route_native

BUILT = library()
if BUILT is None:
    pytest.skip("native products are not built here", allow_module_level=True)
LEVELS_HERE = LEVELS[: LEVELS.index(BUILT.best_level) + 1]


def _logits(num_rows: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_experts)
    return torch.randn(num_rows, num_experts, generator=generator).mul_(3).to(dtype)


@pytest.mark.parametrize("level", LEVELS_HERE)
@given(
    num_experts=st.integers(1, 140),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    normalise=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_best_experts_and_weights_are_those_of_a_plain_softmax(
    level: str, num_experts: int, k: int, dtype: torch.dtype, normalise: bool
) -> None:
    k = min(k, num_experts)
    logits = _logits(37, num_experts, dtype)
    experts, weights = route_rows(level, logits, k, normalise)
    assert all(len(set(row)) == k for row in experts.tolist())
    best = logits.double().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(
        logits.double().gather(1, experts), best.values[:, :k]
    )  # equal ones apart, also the same experts
    expected = torch.softmax(logits.double(), dim=-1).gather(1, experts)
    if normalise:
        expected /= expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-9)
    plain = route_native(logits, k, normalise)
    torch.testing.assert_close(weights, plain.weights_TK, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_has_its_bits_whatever_stands_beside_it(level: str, dtype: torch.dtype) -> None:
    logits = _logits(40, 61, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = route_rows(level, logits, 8, True)
        torch.set_num_threads(1)
        for first, end in ((0, 1), (5, 6), (17, 40), (3, 20)):
            alone = route_rows(level, logits[first:end], 8, True)
            apart = route_rows(level, logits.repeat(1, 2)[first:end, 61:], 8, True)
            for part in (alone, apart):
                assert torch.equal(part[0], whole[0][first:end]) and torch.equal(part[1], whole[1][first:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_of_equal_logits_the_lower_expert_comes_first(level: str) -> None:
    logits = torch.zeros(1, 9)
    logits[0, 4] = logits[0, 7] = 1.0
    assert route_rows(level, logits, 5, False)[0].tolist() == [[4, 7, 0, 1, 2]]


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_weights_that_are_none(level: str, bad: float) -> None:
    logits = _logits(3, 20, torch.float32)
    logits[1, 13] = bad
    experts, weights = route_rows(level, logits, 4, True)
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()
    assert experts.min() >= 0 and experts.max() < 20 and len(set(experts[1].tolist())) == 4


def test_what_does_not_fit_is_refused() -> None:
    for logits, k in ((_logits(2, 4, torch.float32), 5), (_logits(2, 4, torch.float64), 2)):
        with pytest.raises(ValueError, match="no "):
            route_rows("portable", logits, k, True)
