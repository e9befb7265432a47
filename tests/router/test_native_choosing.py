"""Choosing by our own C source against the same in PyTorch, whatever the rows, weights and facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.native_products import LEVELS, library
from router.choosing import Picked, pick
from router.native_choosing import choose_rows, sum_means
from router.scoring import PRESETS, ExpertFacts, ScoreFactors, SnarcWeights
from router.stand_in import replace_spared
from router.step_routing import GateOutput

FOUND = library()
HERE = LEVELS[: LEVELS.index(FOUND.best_level) + 1] if FOUND is not None else ()
pytestmark = pytest.mark.skipif(not HERE, reason="there are no products of our own")
K, EXPERTS, WIDTH = 3, 21, 40
EVEN = ExpertFacts(*torch.full((3, EXPERTS), 0.5))
NOTHING = ScoreFactors(None, None, EVEN)
WEIGHTS = (
    *PRESETS.values(),
    replace(PRESETS["thrifty"], keep_best=2),
    replace(PRESETS["scaled"], keep_best=K + 4, warmth=0.0),
    SnarcWeights(0.0, 0.0, 0.0, 1.0),
)


def draw(seed: int, num_rows: int) -> tuple[torch.Tensor, ScoreFactors, torch.Tensor, torch.Tensor]:
    """Logits, factors, who is cold, and sizes, of which some are not known."""
    generator = torch.Generator().manual_seed(seed)
    logits_RE = torch.randn(num_rows, EXPERTS, generator=generator) * 3
    signals = torch.rand(2, num_rows, generator=generator)
    cold_E = torch.rand(EXPERTS, generator=generator) < 0.7
    novelty_E, trust_E = torch.rand(2, EXPERTS, generator=generator)
    size_E = torch.rand(EXPERTS, generator=generator) * 2
    size_E[torch.rand(EXPERTS, generator=generator) < 0.2] = torch.inf
    facts = ExpertFacts(novelty_E, trust_E, (~cold_E).float())
    return logits_RE, ScoreFactors(signals[0], signals[1], facts), cold_E, size_E


def picked(level: str | None, seed: int, num_rows: int, weights: SnarcWeights, normalise: bool) -> Picked:
    logits_RE, factors, cold_E, size_E = draw(seed, num_rows)
    gate = GateOutput(0, logits_RE, logits_RE, K, normalise, level)
    return pick(gate, logits_RE, factors, weights, K, cold_E, size_E if weights.stand_in else None)


@pytest.mark.parametrize("level", HERE)
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(1, 40),
    weights=st.sampled_from(WEIGHTS),
    normalise=st.booleans(),
)
def test_choice_is_the_one_of_the_plain_operations(
    level: str, seed: int, num_rows: int, weights: SnarcWeights, normalise: bool
) -> None:
    found = picked(level, seed, num_rows, weights, normalise)
    expected = picked(None, seed, num_rows, weights, normalise)
    if weights.router:  # without, experts have equal scores, of which either is right
        assert torch.equal(found.chosen.experts_TK, expected.chosen.experts_TK)
        assert torch.equal(found.cold_RK, expected.cold_RK)
        assert (found.spared_RK is None) == (expected.spared_RK is None)
        torch.testing.assert_close(found.chosen.weights_TK, expected.chosen.weights_TK)
    if found.spared_RK is not None and expected.spared_RK is not None:
        assert torch.equal(found.spared_RK, expected.spared_RK)
        means_ED = torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(seed))
        mine = replace_spared(found.chosen, found.spared_RK, means_ED, level)
        other = replace_spared(expected.chosen, expected.spared_RK, means_ED)
        assert torch.equal(mine.experts_TK, other.experts_TK)
        assert mine.stand_ins is not None and other.stand_ins is not None
        assert torch.equal(mine.stand_ins.rows_N, other.stand_ins.rows_N)
        torch.testing.assert_close(mine.stand_ins.output_ND, other.stand_ins.output_ND)


@pytest.mark.parametrize("level", HERE)
@given(seed=st.integers(0, 2**32), cut=st.integers(1, 39))
def test_a_row_s_bits_do_not_depend_on_its_neighbours(level: str, seed: int, cut: int) -> None:
    logits_RE, (surprise_R, reward_R, facts), cold_E, size_E = draw(seed, 40)
    assert surprise_R is not None and reward_R is not None
    weights = replace(PRESETS["scaled"], stand_in=0.6)

    def chosen(part: slice) -> tuple[torch.Tensor, ...]:
        factors = ScoreFactors(surprise_R[part], reward_R[part], facts)
        *found, spared_RK = choose_rows(level, logits_RE[part], factors, weights, K, True, cold_E, size_E)
        return (*found, torch.zeros_like(found[-1]) if spared_RK is None else spared_RK)

    parts = zip(chosen(slice(0, cut)), chosen(slice(cut, 40)), strict=True)
    for whole, part in zip(chosen(slice(0, 40)), parts, strict=True):
        assert torch.equal(whole, torch.cat(part))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_logits_of_any_kind_give_experts_that_there_are_each_once(value: float) -> None:
    logits_RE = torch.randn(5, EXPERTS)
    logits_RE[1, ::2] = value
    logits_RE[3] = value
    chosen_RK, _, _, _ = choose_rows(
        HERE[-1],
        logits_RE,
        NOTHING,
        PRESETS["thrifty"],
        K,
        True,
        torch.ones(EXPERTS).bool(),
        torch.ones(EXPERTS),
    )
    assert bool(((chosen_RK >= 0) & (chosen_RK < EXPERTS)).all())
    assert all(len(set(row)) == K for row in chosen_RK.tolist())


def test_equal_scores_give_the_lower_expert() -> None:
    chosen_RK, weights_RK, cold_RK, spared_RK = choose_rows(
        HERE[-1], torch.ones(1, EXPERTS), NOTHING, SnarcWeights(), K, True, torch.zeros(EXPERTS).bool(), None
    )
    assert chosen_RK.tolist() == [[0, 1, 2]] and spared_RK is None and not bool(cold_RK.any())
    torch.testing.assert_close(weights_RK, torch.full((1, K), 1 / K))


def test_what_does_not_fit_is_refused_before_a_pointer_goes_out() -> None:
    logits, cold, sizes = torch.ones(2, EXPERTS), torch.ones(EXPERTS).bool(), torch.ones(EXPERTS)
    short = ScoreFactors(None, None, replace(EVEN, trust_E=torch.ones(EXPERTS - 1)))
    lacking = ScoreFactors(torch.ones(1), None, EVEN)
    for given_logits, factors, k, given_cold, given_sizes in (
        (logits.double(), NOTHING, K, cold, sizes),
        (logits, NOTHING, 0, cold, sizes),
        (logits, NOTHING, EXPERTS + 1, cold, sizes),
        (logits, NOTHING, K, cold[1:], sizes),
        (logits, NOTHING, K, cold.float(), sizes),
        (logits, NOTHING, K, cold, sizes[1:]),
        (logits, short, K, cold, sizes),
        (logits, lacking, K, cold, sizes),
    ):
        with pytest.raises(ValueError):
            choose_rows(HERE[-1], given_logits, factors, SnarcWeights(), k, True, given_cold, given_sizes)


@pytest.mark.parametrize(
    ("rows", "expert"), [([2], 0), ([-1], 0), ([0], EXPERTS), ([1, 0], -1), ([0, 1, 2], 1)]
)
def test_numbers_outside_are_refused(rows: list[int], expert: int) -> None:
    experts_RK = torch.full((2, K), expert)
    spared_RK, weights_RK = torch.ones(2, K).bool(), torch.ones(2, K)
    with pytest.raises(ValueError, match="outside"):
        sum_means(HERE[-1], torch.tensor(rows), experts_RK, weights_RK, spared_RK, torch.ones(EXPERTS, WIDTH))
