"""The numbers that a step gives, against cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from router.trust_signals import (
    MAX_SAMPLES,
    TOKENS_A_SAMPLE,
    consistency,
    contribution_shares,
    convergence_values,
    efficiency_values,
    sampled_positions,
    sketch_matrix,
)


@pytest.mark.parametrize("num_prompt", [1, 2, 3, 16, 17, 18, 100, 511, 512, 513, 40000])
def test_sampled_positions_are_few_distinct_and_have_a_next_token(num_prompt: int) -> None:
    positions = sampled_positions(num_prompt)
    assert positions == sorted(set(positions))
    assert len(positions) == min(MAX_SAMPLES, math.ceil((num_prompt - 1) / TOKENS_A_SAMPLE))
    assert all(0 <= position < num_prompt - 1 for position in positions)


def test_token_predicted_as_usual_is_one_half_and_better_is_more() -> None:
    values = convergence_values(torch.tensor([3.0, 1.0, 9.0]), torch.full((3,), 3.0))
    assert values[0] == 0.5
    assert values[1] > 0.8 and values[2] < 0.01


def test_same_output_for_the_same_input_is_fully_consistent() -> None:
    rows = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    values, weights = consistency(rows, rows, rows, rows)
    torch.testing.assert_close(values, torch.ones(2))
    torch.testing.assert_close(weights, torch.ones(2))


@pytest.mark.parametrize(
    ("output", "expected"),
    [((2.0, 0.0), 0.5), ((0.5, 0.0), 0.5), ((0.0, 1.0), 0.5), ((-1.0, 0.0), 0.0), ((0.0, 4.0), 0.125)],
)
def test_consistency_falls_with_norm_and_direction(output: tuple[float, float], expected: float) -> None:
    same, before = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    values, _ = consistency(same, torch.tensor([output]), same, before)
    assert values.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("other", "weight"), [((1.0, 0.0), 0.5), ((-1.0, -1.0), 0.0), ((1.0, -1.0), 0.0), ((0.0, 0.0), 0.0)]
)
def test_only_similar_inputs_count(other: tuple[float, float], weight: float) -> None:
    row = torch.tensor([[1.0, 1.0]])
    values, weights = consistency(row, row, torch.tensor([other]), row)
    assert weights.item() == pytest.approx(weight, abs=1e-6)
    assert torch.isfinite(values).all()


def test_contribution_is_shared_out_by_weighted_norm() -> None:
    shares = contribution_shares(
        torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.25, 0.5], [0.5, 0.5]])
    )
    assert shares.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_efficiency_of_equals_is_one_half() -> None:
    ones = torch.ones(4)
    assert efficiency_values(ones, ones, ones).tolist() == [0.5] * 4


def test_efficiency_grows_with_contribution_and_falls_with_cost() -> None:
    ones = torch.ones(3)
    gained = efficiency_values(torch.tensor([2.0, 1.0, 1.0]), ones, ones)
    assert gained[0] > 0.5 > gained[1]
    dear = efficiency_values(ones, torch.tensor([4.0, 1.0, 1.0]), ones)
    assert dear[0] < 0.5 < dear[1]
    busy = efficiency_values(ones, ones, torch.tensor([4.0, 1.0, 1.0]))
    assert busy[0] < 0.5 < busy[1]


def test_expert_that_was_not_used_has_no_efficiency() -> None:
    used = torch.tensor([1.0, 0.0])
    values = efficiency_values(used, used, used)
    assert values[0] == 0.5 and math.isnan(values[1])


def test_sketch_keeps_norms_and_directions_about() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(50, 2048, generator=generator)
    sketch = rows @ sketch_matrix(2048, 64)
    norms = sketch.norm(dim=1) / rows.norm(dim=1)
    assert norms.min() > 0.6 and norms.max() < 1.5
    exact = torch.cosine_similarity(rows[:-1], rows[1:] + rows[:-1], dim=1)
    rough = torch.cosine_similarity(sketch[:-1], sketch[1:] + sketch[:-1], dim=1)
    assert (exact - rough).abs().max() < 0.4
    assert torch.equal(sketch_matrix(2048, 64), sketch_matrix(2048, 64))
