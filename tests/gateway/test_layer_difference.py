"""When two outputs of a layer count as the same."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gateway.stores.layer_difference import TOLERANCE, measure
from router.single_layer import LayerOutput


def _output(
    hidden: list[list[float]], experts: list[list[int]] | None, gate: list[list[float]]
) -> LayerOutput:
    chosen = None if experts is None else torch.tensor(experts)
    return LayerOutput(torch.tensor(hidden), chosen, None if experts is None else torch.tensor(gate))


CLEAR = [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]
EXPERTS = [[0, 1], [0, 1]]
ROWS = [[1.0, -10.0], [1.0, 1000.0]]


def test_difference_is_measured_against_the_largest_value_of_its_own_token() -> None:
    theirs = _output(ROWS, EXPERTS, CLEAR)
    ours = _output([[1.0, -10.0], [1.05, 1000.0]], EXPERTS, CLEAR)
    found = measure(7, ours, theirs)
    assert (found.layer, found.rerouted, found.is_within) == (7, 0.0, True)
    assert found.worst == pytest.approx(0.05, rel=1e-3) and found.relative == pytest.approx(5e-5, rel=1e-3)
    ours = _output([[1.05, -10.0], [1.0, 1000.0]], EXPERTS, CLEAR)
    assert measure(7, ours, theirs).relative == pytest.approx(5e-3, rel=1e-3)
    assert not measure(7, ours, theirs).is_within


def test_order_of_the_same_experts_does_not_matter() -> None:
    found = measure(0, _output(ROWS, [[1, 0], [0, 1]], CLEAR), _output(ROWS, EXPERTS, CLEAR))
    assert (found.rerouted, found.is_within) == (0.0, True)


def test_other_experts_put_the_layer_outside_even_where_the_rows_agree() -> None:
    found = measure(0, _output(ROWS, [[0, 2], [0, 1]], CLEAR), _output(ROWS, EXPERTS, CLEAR))
    assert (found.rerouted, found.worst, found.is_within) == (0.5, 0.0, False)


def test_token_on_the_edge_of_its_choice_is_not_measured() -> None:
    edge = [[3.0, 1.0 + TOLERANCE, 1.0], [3.0, 2.0, 1.0]]
    ours = _output([[5.0, 5.0], ROWS[1]], [[0, 2], [0, 1]], edge)
    found = measure(0, ours, _output(ROWS, EXPERTS, edge))
    assert (found.rerouted, found.worst, found.is_within) == (0.5, 0.0, True)


def test_layer_of_ties_alone_says_nothing_and_is_outside() -> None:
    ties = [[1.0, 1.0, 1.0]] * 2
    found = measure(0, _output(ROWS, [[0, 2], [1, 2]], ties), _output(ROWS, EXPERTS, ties))
    assert (found.rerouted, found.worst, found.is_within) == (1.0, math.inf, False)


def test_every_expert_chosen_has_no_edge() -> None:
    everyone = [[0, 1, 2], [2, 1, 0]]
    assert measure(0, _output(ROWS, everyone, CLEAR), _output(ROWS, everyone, CLEAR)).is_within


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_number_that_is_none_is_outside_and_null_in_json(value: float) -> None:
    found = measure(0, _output([[value, 1.0], ROWS[1]], None, []), _output(ROWS, None, []))
    assert not found.is_within
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["worst"] is None


def test_dense_layer_has_no_routing_and_zero_equals_zero() -> None:
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    found = measure(0, _output(zeros, None, []), _output(zeros, None, []))
    assert (found.worst, found.relative, found.rerouted, found.is_within) == (0.0, 0.0, 0.0, True)
