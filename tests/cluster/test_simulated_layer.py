"""One layer by hand: cores that are shared, links that carry one message after another, a router that is one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.simulated_layer import Job, Machines, layer_s
from cluster.simulated_worker import Costs, RouterCosts
from cluster.topology import NodeFacts

COSTS = Costs(RouterCosts(0.0, 0.0, 0.0, 0.0), RouterCosts(0.0, 0.0, 0.0, 0.0), *[0.0] * 4)
HOME = NodeFacts("home", "10.0.0.1", 1, 2, 1.0, float("inf"), 0.0)
AWAY = NodeFacts("away", "10.0.0.2", 1, 4, 1.0, 1000.0, 0.2)
FAR = replace(AWAY, node_id="far", address="10.0.0.3")
MACHINES = Machines({node.node_id: node for node in (HOME, AWAY, FAR)}, "home", frozenset())


def _job(node_id: str, compute_s: float, **changes: float) -> Job:
    return replace(Job(node_id, compute_s, 0.0, 0, 0), **changes)


def test_nothing_to_ask_takes_the_routers_own_share() -> None:
    assert layer_s([], 0.5, MACHINES, COSTS) == 0.5
    assert (
        MACHINES.router_bytes_s == 1000.0
        and Machines({"home": HOME}, "home", frozenset()).router_bytes_s > 1e300
    )


def test_slowest_of_several_nodes_is_waited_for_while_the_router_computes() -> None:
    jobs = [_job("away", 1.0), _job("far", 3.0)]
    assert layer_s(jobs, 2.0, MACHINES, COSTS) == pytest.approx(3.2)
    assert layer_s(jobs, 5.0, MACHINES, COSTS) == pytest.approx(5.0)


def test_router_handles_one_message_after_another() -> None:
    jobs = [_job("away", 1.0, message_s=0.4), _job("far", 1.0, message_s=0.4)]
    # Asked at 0.2 and 0.4; the answers, there at 1.4 and 1.6, take 0.2 each.
    assert layer_s(jobs, 0.0, MACHINES, COSTS) == pytest.approx(1.8)
    many = [_job("away", 0.0, message_s=0.4)] * 4
    assert layer_s(many, 0.0, MACHINES, COSTS) == pytest.approx(4 * 0.4)


def test_more_work_than_cores_waits_for_a_core() -> None:
    assert layer_s([_job("away", 1.0)] * 4, 0.0, MACHINES, COSTS) == pytest.approx(1.2)
    assert layer_s([_job("away", 1.0)] * 5, 0.0, MACHINES, COSTS) == pytest.approx(2.2)
    two_threads = replace(COSTS, threads=2)
    assert layer_s([_job("away", 1.0)] * 4, 0.0, MACHINES, two_threads) == pytest.approx(2.2)


def test_actors_beside_a_computing_router_have_one_core_less() -> None:
    jobs = [_job("home", 1.0)] * 2
    assert layer_s(jobs, 0.0, MACHINES, COSTS) == pytest.approx(1.0)
    assert layer_s(jobs, 3.0, MACHINES, COSTS) == pytest.approx(3.0)
    assert layer_s(jobs, 1.5, MACHINES, COSTS) == pytest.approx(2.0)


def test_crowded_node_overlaps_only_in_part() -> None:
    jobs = [_job("home", 1.0)] * 2
    crowded = replace(MACHINES, crowded=frozenset({"home"}))
    for overlap, expected in ((1.0, 1.0), (0.5, 1.5), (0.0, 2.0)):
        assert layer_s(jobs, 0.0, crowded, replace(COSTS, overlap=overlap)) == pytest.approx(expected)
    assert layer_s([_job("away", 1.0)] * 2, 0.0, crowded, replace(COSTS, overlap=0.0)) == pytest.approx(1.2)


def test_answers_of_many_nodes_share_the_routers_link() -> None:
    one = layer_s([_job("away", 1.0, answered_bytes=500)], 0.0, MACHINES, COSTS)
    assert one == pytest.approx(1.7)
    both = [_job("away", 1.0, answered_bytes=500), _job("far", 1.0, answered_bytes=500)]
    assert layer_s(both, 0.0, MACHINES, COSTS) == pytest.approx(2.2)


def test_questions_share_it_too_and_loopback_has_none() -> None:
    both = [_job("away", 1.0, asked_bytes=500), _job("far", 1.0, asked_bytes=500)]
    assert layer_s(both, 0.0, MACHINES, COSTS) == pytest.approx(2.2)
    assert layer_s([_job("home", 1.0, asked_bytes=500)], 0.0, MACHINES, COSTS) == pytest.approx(1.0)
