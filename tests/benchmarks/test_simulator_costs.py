"""Costs that are known must be found again in runs that follow from them."""

from __future__ import annotations

from dataclasses import astuple
from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks.bench_cluster import Contender
from benchmarks.simulator_costs import STREAMS, Observed, Runs, Size, fit_costs
from cluster.simulated_worker import RouterCosts

STEPS, LAYERS = 10, 6
NEAR = RouterCosts(4e-4, 2e-5, -1e-4, 1e-6)
FAR = RouterCosts(4e-3, 2e-4, 2e-4, 1e-5)
CALL_S, EXPERT_S, EXPERT_ROW_S = 2e-4, 5e-5, 2e-6
MESSAGE_S, MESSAGE_ROW_S, FRAME_S, ROUND_TRIP_S = 2e-4, 1e-6, 1.5e-4, 1e-4
ACTOR_FACTOR = 1.25


def _compute_s(size: Size) -> float:
    return CALL_S + size.experts * EXPERT_S + (size.rows - size.experts) * EXPERT_ROW_S


def _sizes(streams: int, call: int) -> Size:
    """Some experts more in every other call, or nothing would tell experts from rows."""
    return Size(min(64, 6 * streams + call % 5), 8 * streams)


def _near_run(streams: int) -> Observed:
    """All layers of a step in one call."""
    calls_s = sum(_compute_s(_sizes(streams, call)) for call in range(STEPS * LAYERS))
    own_s = calls_s + STEPS * LAYERS * NEAR.of_layer(streams)
    return Observed(streams, STEPS, outside_s=STEPS * NEAR.of_step(streams), own_s=own_s)


def _run(num_actors: int, streams: int) -> Observed:
    run = Observed(streams, steps=STEPS)
    run.outside_s = STEPS * FAR.of_step(streams)
    for call in range(STEPS * LAYERS):
        run.own_s += FAR.of_layer(streams)
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
    near = [_near_run(streams) for streams in STREAMS]
    runs = Runs(near, *([_run(number, streams) for streams in STREAMS] for number in (0, 1, 2)))
    here = SimpleNamespace(loaded=SimpleNamespace(config=SimpleNamespace(expert_elements=1)))
    costs, round_trip_s = fit_costs([runs, runs], cast(Contender, here))
    assert astuple(costs.near) == pytest.approx(astuple(NEAR))
    assert astuple(costs.far) == pytest.approx(astuple(FAR))
    assert (costs.call_s, costs.expert_s, costs.expert_row_s) == pytest.approx(
        (CALL_S, EXPERT_S, EXPERT_ROW_S)
    )
    assert (costs.message_s, costs.message_row_s) == pytest.approx((MESSAGE_S, MESSAGE_ROW_S))
    assert costs.frame_s == pytest.approx(FRAME_S) and round_trip_s == pytest.approx(ROUND_TRIP_S)
    assert costs.actor_factor == pytest.approx(ACTOR_FACTOR)
    assert costs.threads == 1
    assert (costs.crowded_work, costs.crowded_messages) == (1.0, 1.0)


def test_messages_between_cores_of_their_own_are_told_from_those_that_wake_somebody() -> None:
    runs = Runs(*([_run(number, streams) for streams in STREAMS] for number in (0, 0, 1, 2)))
    for run in runs.one:
        saved_s = 0.5 * len(run.messages) * (MESSAGE_S + FRAME_S) + len(run.messages) * ROUND_TRIP_S
        size, seconds = run.calls[0]
        run.calls[0] = size, seconds - saved_s
    here = SimpleNamespace(loaded=SimpleNamespace(config=SimpleNamespace(expert_elements=1)))
    costs, round_trip_s = fit_costs([runs], cast(Contender, here))
    assert (costs.message_s, costs.frame_s) == pytest.approx((MESSAGE_S / 2, FRAME_S / 2))
    assert costs.crowded_messages == pytest.approx(2.0) and round_trip_s == 0.0
