"""The simulator's arithmetic by hand on small cases, and what must hold for any cluster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.autoscaler import ScalerSettings
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.simulated_worker import Costs, ModelShape, RouterCosts
from cluster.simulator import NodeEvent, Simulation
from cluster.topology import NodeFacts, Topology
from extraction.manifest import ExpertKey

SHAPE = ModelShape("thinker", (0, 1), expert_bytes=1_000_000, row_bytes=4096)
ALONE = RouterCosts(step_s=1e-3, row_s=1e-4, layer_s=1e-5, layer_row_s=0.0)
ASKING = RouterCosts(step_s=2e-3, row_s=3e-4, layer_s=3e-5, layer_row_s=0.0)
COSTS = Costs(
    ALONE,
    ASKING,
    call_s=2e-5,
    expert_s=0.0,
    expert_row_s=1e-6,
    message_s=3e-5,
    notice_s=0.5,
    start_s=2.0,
)
EXPERTS = 8
HOME = NodeFacts("home", "10.0.0.1", 100_000_000, 2, 1e10, float("inf"), 0.0)
AWAY = NodeFacts("away", "10.0.0.2", 100_000_000, 2, 1e10, 1e8, 2e-4)
FAR = replace(AWAY, node_id="far", address="10.0.0.3")


def _keys(*experts: int) -> tuple[ExpertKey, ...]:
    return tuple(ExpertKey("thinker", layer, expert) for layer in SHAPE.layers for expert in experts)


def _plan(*actors: ActorPlan, local: tuple[int, ...] = ()) -> ServicePlan:
    left = [expert for expert in range(EXPERTS) if expert not in local]
    groups = (ExpertGroup("even", _keys(*left[::2])), ExpertGroup("odd", _keys(*left[1::2])))
    return ServicePlan(groups, actors, _keys(*local))


def _routing(steps: int, rows: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    draws = random.random((steps, rows, len(SHAPE.layers), EXPERTS))
    return np.argsort(draws, axis=-1)[..., :2].astype(np.int16)


def _run(simulation: Simulation, routing: np.ndarray) -> Simulation:
    for experts_TLK in routing:
        simulation.step(experts_TLK)
    return simulation


def test_step_in_one_process_adds_up() -> None:
    simulation = Simulation(SHAPE, Topology((HOME,), "home"), _plan(local=tuple(range(EXPERTS))), COSTS)
    seconds = simulation.step(np.array([[[0, 1], [2, 3]]]))
    layer_s = ALONE.layer_s + COSTS.call_s + 2 * SHAPE.expert_bytes / HOME.expert_bytes_s
    assert seconds == pytest.approx(ALONE.step_s + 2 * layer_s)
    assert simulation.report.messages == 0 and simulation.report.uses_by_router == 4


def test_remote_layer_waits_for_link_and_slowest_actor() -> None:
    plan = _plan(ActorPlan("a", "even", "away"), ActorPlan("b", "odd", "far"))
    slow = replace(FAR, round_trip_s=1e-3)
    simulation = Simulation(SHAPE, Topology((HOME, AWAY, slow), "home"), plan, COSTS)
    seconds = simulation.step(np.array([[[0, 1], [0, 2]]]))
    expert_s = SHAPE.expert_bytes / AWAY.expert_bytes_s
    # Layer 0: both are asked, over the router's one link; the slower one answers last. Layer 1: one has both experts.
    both = ASKING.layer_s + COSTS.message_s + COSTS.call_s + expert_s + 1e-3 + 3 * 4096 / 1e8
    one = ASKING.layer_s + COSTS.message_s + COSTS.call_s + 2 * expert_s + AWAY.round_trip_s + 3 * 4096 / 1e8
    assert seconds == pytest.approx(ASKING.step_s + both + one)
    assert simulation.report.messages == 3 and simulation.report.bytes_sent == 7 * 4096


def test_router_and_actors_of_a_service_with_actors_take_their_own_time() -> None:
    plan = _plan(ActorPlan("a", "even", "away"), ActorPlan("b", "odd", "far"))
    costs = replace(COSTS, actor_factor=2.0, frame_s=7e-5, message_row_s=1e-6)
    simulation = Simulation(SHAPE, Topology((HOME, AWAY, FAR), "home"), plan, costs)
    seconds = simulation.step(np.array([[[0, 2], [4, 6]]]))
    compute_s = 7e-5 + 2.0 * COSTS.call_s + 2 * SHAPE.expert_bytes / AWAY.expert_bytes_s
    message_s = COSTS.message_s + 2e-6 + AWAY.round_trip_s + 3 * 4096 / 1e8
    own_s = ASKING.step_s + 2 * ASKING.layer_s
    assert seconds == pytest.approx(own_s + 2 * (compute_s + message_s))
    report = simulation.report
    assert report.router_s == pytest.approx(own_s)
    assert report.messages_s == pytest.approx(2 * (COSTS.message_s + 2e-6))


def test_more_processes_than_cores_take_longer_for_work_and_messages() -> None:
    plan = _plan(ActorPlan("a", "even", "home"), ActorPlan("b", "odd", "home"))
    routing = np.array([[[0, 2], [4, 6]]])
    roomy, crowded = (replace(HOME, num_cores=cores) for cores in (3, 2))
    costs = replace(COSTS, crowded_work=1.5, crowded_messages=3.0, frame_s=7e-5)
    seconds = [
        Simulation(SHAPE, Topology((node,), "home"), plan, costs).step(routing) for node in (roomy, crowded)
    ]
    weights_s = 2 * 2 * SHAPE.expert_bytes / HOME.expert_bytes_s
    work_s, messages_s = ASKING.step_s + 2 * (ASKING.layer_s + COSTS.call_s), 2 * (COSTS.message_s + 7e-5)
    assert seconds[0] == pytest.approx(work_s + messages_s + weights_s)
    assert seconds[1] == pytest.approx(1.5 * work_s + 3.0 * messages_s + weights_s)


def test_misses_are_read_at_the_disks_rate_and_counted() -> None:
    plan = _plan(ActorPlan("a", "even", "home", SHAPE.expert_bytes), ActorPlan("b", "odd", "home"))
    simulation = Simulation(SHAPE, Topology((HOME,), "home"), plan, COSTS)
    _run(simulation, np.array([[[[0, 2], [4, 6]]]] * 10))
    report = simulation.report
    assert report.uses == 40 and report.misses >= 30
    assert report.step_s[-1] > 4 * SHAPE.expert_bytes / HOME.disk_bytes_s


def test_every_use_is_counted_once_whatever_the_plan() -> None:
    routing = _routing(20, 3)
    topology = Topology((HOME, AWAY, FAR), "home")
    plans = [
        _plan(local=tuple(range(EXPERTS))),
        _plan(ActorPlan("a", "even", "away"), ActorPlan("b", "odd", "far"), local=(0, 1)),
        _plan(ActorPlan("a", "even", "away"), ActorPlan("a2", "even", "far"), ActorPlan("b", "odd", "far")),
        _plan(ActorPlan("a", "even", "away")),
    ]
    distinct = sum(len(np.unique(step[:, layer])) for step in routing for layer in range(len(SHAPE.layers)))
    for plan in plans:
        report = _run(Simulation(SHAPE, topology, plan, COSTS), routing).report
        assert report.uses == distinct and report.num_tokens == 60


def test_faster_links_and_machines_never_slow_it_down() -> None:
    routing = _routing(20, 4)
    plan = _plan(ActorPlan("a", "even", "away"), ActorPlan("b", "odd", "far"))
    base = _run(Simulation(SHAPE, Topology((HOME, AWAY, FAR), "home"), plan, COSTS), routing).report.seconds
    for change in ({"bandwidth_bytes_s": 1e9}, {"round_trip_s": 1e-5}, {"expert_bytes_s": 1e11}):
        nodes = (HOME, replace(AWAY, **change), replace(FAR, **change))
        better = _run(Simulation(SHAPE, Topology(nodes, "home"), plan, COSTS), routing).report.seconds
        assert better < base


def test_lost_node_costs_its_notice_once_and_its_experts_go_on() -> None:
    plan = _plan(ActorPlan("a", "even", "away"), ActorPlan("b", "odd", "far"))
    topology = Topology((HOME, AWAY, FAR), "home")
    simulation = Simulation(SHAPE, topology, plan, COSTS, events=[NodeEvent(0.05, "away")])
    report = _run(simulation, _routing(200, 2)).report
    stalls = [seconds for seconds in report.step_s if seconds > COSTS.notice_s]
    assert len(stalls) == 1 and report.uses_by_router > 0


def test_replica_takes_over_without_the_router() -> None:
    plan = _plan(ActorPlan("a", "even", "away"), ActorPlan("a2", "even", "far"), ActorPlan("b", "odd", "far"))
    topology = Topology((HOME, AWAY, FAR), "home")
    simulation = Simulation(SHAPE, topology, plan, COSTS, events=[NodeEvent(0.05, "away")])
    assert _run(simulation, _routing(200, 2)).report.uses_by_router == 0


def test_autoscaler_moves_a_lost_nodes_actor_and_the_router_is_relieved() -> None:
    plan = _plan(ActorPlan("a", "even", "away"), ActorPlan("b", "odd", "far"))
    simulation = Simulation(
        SHAPE,
        Topology((HOME, AWAY, FAR), "home"),
        plan,
        COSTS,
        scaling=ScalerSettings(max_actors=2),
        events=[NodeEvent(0.5, "away")],
    )
    routing = _routing(4000, 2)
    _run(simulation, routing[:3000])
    decisions = [decision for _, decision in simulation.report.decisions]
    assert [(decision.kind, decision.group) for decision in decisions] == [("move", "even")]
    before = simulation.report.uses_by_router
    _run(simulation, routing[3000:])
    assert simulation.report.uses_by_router == before


def test_routers_own_node_cannot_be_lost() -> None:
    with pytest.raises(ValueError, match="router's own node"):
        Simulation(SHAPE, Topology((HOME,), "home"), _plan(), COSTS, events=[NodeEvent(1.0, "home")])
