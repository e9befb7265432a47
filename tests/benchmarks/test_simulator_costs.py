"""Costs that are known must be found again in runs that follow from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks.bench_cluster import Contender
from benchmarks.simulator_costs import STREAMS, Observed, Size, fit_costs

STEPS, LAYERS = 10, 6
STEP_S, ROW_S, LAYER_S, LAYER_ROW_S = 4e-3, 2e-4, 2e-4, 1e-5
CALL_S, EXPERT_S, EXPERT_ROW_S = 2e-4, 5e-5, 2e-6
MESSAGE_S, MESSAGE_ROW_S, FRAME_S, ROUND_TRIP_S = 2e-4, 1e-6, 1.5e-4, 1e-4
ACTOR_FACTOR, ROUTER_FACTOR = 1.25, 1.1


def _compute_s(size: Size) -> float:
    return CALL_S + size.experts * EXPERT_S + (size.rows - size.experts) * EXPERT_ROW_S


def _sizes(streams: int, call: int) -> Size:
    """Some experts more in every other call, or nothing would tell experts from rows."""
    return Size(min(64, 6 * streams + call % 5), 8 * streams)


def _run(num_actors: int, streams: int) -> Observed:
    run, factor = Observed(streams, steps=STEPS), ROUTER_FACTOR if num_actors else 1.0
    run.outside_s = STEPS * factor * (STEP_S + (streams - 1) * ROW_S)
    for call in range(STEPS * LAYERS):
        run.own_s += factor * (LAYER_S + (streams - 1) * LAYER_ROW_S)
        size = _sizes(streams, call)
        if not num_actors:
            run.calls.append((size, _compute_s(size)))
            continue
        share = Size(size.experts // num_actors, size.rows // num_actors)
        busy_s = ACTOR_FACTOR * _compute_s(share)
        message_s = MESSAGE_S + share.rows * MESSAGE_ROW_S
        run.messages.extend([share] * num_actors)
        run.actors_busy_s += num_actors * busy_s
        run.actors_cpu_s += num_actors * (busy_s + FRAME_S)
        run.router_cpu_s += num_actors * message_s
        run.calls.append((size, num_actors * message_s + FRAME_S + busy_s + ROUND_TRIP_S))
    return run


def test_known_costs_are_found_again() -> None:
    runs = {number: [_run(number, streams) for streams in STREAMS] for number in (0, 1, 2)}
    here = SimpleNamespace(loaded=SimpleNamespace(config=SimpleNamespace(expert_elements=1)))
    costs, round_trip_s = fit_costs([runs, runs], cast(Contender, here))
    found = (costs.step_s, costs.row_s, costs.layer_s, costs.layer_row_s)
    assert found == pytest.approx((STEP_S, ROW_S, LAYER_S, LAYER_ROW_S))
    assert (costs.call_s, costs.expert_s, costs.expert_row_s) == pytest.approx(
        (CALL_S, EXPERT_S, EXPERT_ROW_S)
    )
    assert (costs.message_s, costs.message_row_s) == pytest.approx((MESSAGE_S, MESSAGE_ROW_S))
    assert costs.frame_s == pytest.approx(FRAME_S) and round_trip_s == pytest.approx(ROUND_TRIP_S)
    assert costs.actor_factor == pytest.approx(ACTOR_FACTOR)
    assert costs.router_factor == pytest.approx(ROUTER_FACTOR)
    assert costs.threads == 1
