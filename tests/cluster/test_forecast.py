"""What a plan will give, against routing that is drawn by lot and the frames that are really sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.random_store import QWEN3_30B_A3B
from cluster.forecast import Forecast, count_copies, forecast, typical_costs
from cluster.holdings import ROUTER, holdings
from cluster.model_sizes import ModelSizes, measure_model
from cluster.placement import PlacementOptions, place, plan_local
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.simulated_worker import Costs, RouterCosts
from cluster.topology import NodeFacts, Topology
from experts.call import ExpertCall
from experts.frame import HEADER_BYTES, Agreement, encode_call
from experts.shares import split_by_place
from extraction.manifest import ExpertKey

GIB = 1 << 30
SMALL = QWEN3_30B_A3B | {
    "vocab_size": 1000,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
}
FREE = Costs(RouterCosts(0.0, 0.0, 0.0, 0.0), RouterCosts(0.0, 0.0, 0.0, 0.0), *[0.0] * 4)
"""Software that takes no time."""


@pytest.fixture(scope="module")
def model() -> ModelSizes:
    return measure_model(SMALL, torch.float32)


def machine(name: str, *, room: int = GIB, speed: float = 1e10, round_trip_s: float = 1e-4) -> NodeFacts:
    return NodeFacts(name, name, room, 8, speed, 1e9, round_trip_s, has_store=name == "a")


def forecast_of(plan: ServicePlan, topology: Topology, model: ModelSizes, num_streams: int = 1) -> Forecast:
    return forecast(plan, topology, model.uniform_demand(), model, num_streams=num_streams, costs=FREE)


def test_one_process_sends_nothing_and_takes_its_bytes_at_its_speed(model: ModelSizes) -> None:
    topology = Topology((machine("a"),), "a")
    result = forecast_of(plan_local(list(model.expert_sizes()), 0), topology, model)
    assert result.traffic.messages == result.traffic.bytes == result.network_floor_s == 0
    assert result.expert_s == pytest.approx(2 * 4 * model.expert_bytes / 1e10)
    assert result.tokens_per_s[1] == pytest.approx(1 / ((model.active_bytes + 8 * model.expert_bytes) / 1e10))


@pytest.mark.parametrize("num_streams", [1, 5])
@pytest.mark.parametrize("num_actors", [1, 3])
def test_messages_and_bytes_are_those_of_frames_for_random_routing(
    model: ModelSizes, num_actors: int, num_streams: int
) -> None:
    keys = [key for key in model.expert_sizes() if key.layer == 0]
    plan = plan_local(keys, num_actors)
    owners = plan.owners()
    demand = model.uniform_demand()
    demand = replace(demand, sizes=dict.fromkeys(keys, 1), uses={key: demand.uses[key] for key in keys})
    topology = Topology((machine("a"),), "a")
    result = forecast(plan, topology, demand, model, num_streams=num_streams)
    messages, num_bytes = _drawn_traffic(owners, model, num_streams, steps=400)
    assert result.traffic.messages == pytest.approx(messages, rel=0.05)
    assert result.traffic.bytes == pytest.approx(num_bytes, rel=0.03)


def _drawn_traffic(
    owners: Mapping[ExpertKey, tuple[str, ...]], model: ModelSizes, num_streams: int, steps: int
) -> tuple[float, float]:
    random = np.random.default_rng(0)
    agreed = Agreement(1, model.config.hidden_size, torch.float32, (model.component,), 1024)
    num_experts, per_token = model.config.num_experts, model.config.experts_per_token
    messages = num_bytes = 0
    for _ in range(steps):
        experts_TK = np.stack(
            [random.choice(num_experts, per_token, replace=False) for _ in range(num_streams)]
        )
        experts, counts = np.unique(experts_TK, return_counts=True)
        order = np.argsort(experts_TK.flatten(), kind="stable")
        tokens_TD = torch.zeros(num_streams, model.config.hidden_size)
        rows = tuple((order // per_token).tolist())
        call = ExpertCall(
            model.component, 0, tuple(experts.tolist()), tuple(counts.tolist()), rows, tokens_TD, ""
        )
        places = [owners[ExpertKey(model.component, 0, expert)][0] for expert in experts.tolist()]
        for share in split_by_place(call, places).values():
            messages += 1
            asked = len(encode_call(share.call, agreed, 1, 1)) + share.call.tokens_TD.nbytes
            num_bytes += asked + HEADER_BYTES + len(share.rows) * model.row_bytes
    return messages / steps / num_streams, num_bytes / steps / num_streams


def test_network_floor_is_a_round_trip_for_every_layer_that_leaves_the_machine(model: ModelSizes) -> None:
    topology = Topology((machine("a", room=0), machine("b", round_trip_s=1e-3)), "a")
    plan = place(topology, model.uniform_demand(), None, PlacementOptions(replicas=1))
    result = forecast_of(plan, topology, model)
    assert result.traffic.messages == 2
    assert result.network_floor_s == pytest.approx(2 * (1e-3 + 5 * model.row_bytes / 1e9), rel=1e-3)


def test_what_is_not_in_memory_is_missed_and_slows_the_low_end_most(model: ModelSizes) -> None:
    demand = model.uniform_demand()
    uses = {key: 1.0 if key.expert < 3 else 1.0 / 29 for key in demand.uses}
    demand = replace(demand, uses=uses)
    topology = Topology((machine("a"),), "a")
    half = replace(plan_local(list(uses), 0), router_budget_bytes=demand.total_bytes // 2)
    result = forecast(half, topology, demand, model, costs=FREE)
    assert result.miss_rate == pytest.approx(0.5 / 4 * 32 / 29, rel=0.02)
    low, high = result.tokens_per_s
    read_s = 2 * 2 * model.expert_bytes / 1e9  # uniformly, half of four uses in both layers
    assert 1 / (1.5 * low) - 1 / high > 0.5 * read_s


def test_actors_of_one_machine_share_its_speed(model: ModelSizes) -> None:
    topology = Topology((machine("a"),), "a")
    keys = list(model.expert_sizes())
    held = holdings(plan_local(keys, 4), topology, model.uniform_demand())
    assert [holding.name for holding in held] == [ROUTER, *(f"experts-{index}" for index in range(4))]
    assert {holding.seat.byte_s for holding in held[1:]} == {4 / 1e10}
    assert {holding.seat.round_trip_s for holding in held[1:]} == {1e-4}


@pytest.mark.parametrize("num_cores, is_crowded", [(3, False), (2, True)])
def test_crowded_machine_slows_work_and_messages_and_computes_one_after_another(
    model: ModelSizes, num_cores: int, is_crowded: bool
) -> None:
    topology = Topology(
        (replace(machine("a", speed=float("inf"), round_trip_s=0.0), num_cores=num_cores),), "a"
    )
    keys = list(model.expert_sizes())
    own = RouterCosts(step_s=1e-3, row_s=0.0, layer_s=0.0, layer_row_s=0.0)
    plain = Costs(own, own, call_s=0.0, expert_s=0.0, expert_row_s=0.0, message_s=0.0)
    crowding = {"crowded_work": 2.0, "crowded_messages": 3.0, "overlap": 0.25}

    def step_s(**costs: float) -> float:
        plan, demand = plan_local(keys, 2), model.uniform_demand()
        result = forecast(plan, topology, demand, model, costs=replace(plain, **crowding, **costs))
        return 1.0 / result.tokens_per_s[1] - result.backbone_s

    own_s = step_s()
    assert own_s == pytest.approx(2e-3 if is_crowded else 1e-3, rel=0.01)  # and answers on their way
    messages = forecast_of(plan_local(keys, 2), topology, model).traffic.messages
    assert step_s(message_s=1e-3) - own_s == pytest.approx(messages * (3e-3 if is_crowded else 1e-3))
    called_s, calling_s = step_s(call_s=1e-3) - own_s, step_s(frame_s=1e-3) - own_s
    assert called_s == pytest.approx(calling_s * (2.0 * (0.25 + 0.75 * 2) / 3.0 if is_crowded else 1.0))


def test_replicas_crowd_a_machine_but_answer_for_nothing(model: ModelSizes) -> None:
    demand = model.uniform_demand()
    room = int(0.6 * sum(demand.sizes.values()))
    topology = Topology(tuple(machine(name, room=room) for name in "abc"), "a")
    for replicas in (1, 2):
        plan = place(topology, demand, None, PlacementOptions(replicas=replicas))
        held = holdings(plan, topology, demand)
        assert plan.groups and len(held) == 1 + len(plan.groups)
        assert len(plan.actors) == replicas * len(plan.groups)
        nodes = ["a", *(actor.node_id for actor in plan.actors)]
        assert all(holding.num_processes == nodes.count(holding.seat.node_id) for holding in held)


def test_group_without_an_actor_is_computed_by_the_router(model: ModelSizes) -> None:
    topology = Topology((machine("a"),), "a")
    keys = tuple(sorted(model.expert_sizes()))
    (held,) = holdings(ServicePlan((ExpertGroup("g", keys),), ()), topology, model.uniform_demand())
    assert held.group_bytes == model.total_expert_bytes


def test_more_machines_are_not_slower_and_send_more(model: ModelSizes) -> None:
    wide = measure_model(QWEN3_30B_A3B | {"num_hidden_layers": 2}, torch.bfloat16)
    results = []
    for count in (1, 2, 4):
        nodes = tuple(machine(name, room=4 * GIB) for name in "abcd"[:count])
        topology = Topology(nodes, "a")
        plan = place(topology, wide.uniform_demand(), None, PlacementOptions(replicas=1))
        results.append(forecast_of(plan, topology, wide))
    assert results[0].expert_s > results[1].expert_s > results[2].expert_s
    assert results[0].traffic.messages < results[1].traffic.messages < results[2].traffic.messages


def test_copies_count_stores_actors_and_the_router() -> None:
    first, second, third = (ExpertKey("model", 0, expert) for expert in range(3))
    groups = (ExpertGroup("g", (first,)), ExpertGroup("h", (second,)))
    actors = (ActorPlan("g", "g", "b"), ActorPlan("g-r2", "g", "c"), ActorPlan("h", "h", "b"))
    plan = ServicePlan(groups, actors, (third,))
    nodes = tuple(replace(machine(name), has_store=False) for name in "abc")
    copies = count_copies(plan, Topology(nodes, "a"))
    assert copies.single == (second, third)
    assert copies.unsafe == (second,)
    stored = (replace(nodes[0], has_store=True), *nodes[1:])
    assert count_copies(plan, Topology(stored, "a")).single == (third,)


def test_software_that_takes_time_lowers_both_ends(model: ModelSizes) -> None:
    topology = Topology((machine("a"),), "a")
    plan = plan_local(list(model.expert_sizes()), 2)
    demand = model.uniform_demand()
    free = forecast(plan, topology, demand, model, costs=FREE).tokens_per_s
    usual = forecast(plan, topology, demand, model, costs=typical_costs(2)).tokens_per_s
    assert usual[0] < free[0] and usual[1] < free[1]
    slow = replace(typical_costs(2), actor_factor=3.0)
    assert forecast(plan, topology, demand, model, costs=slow).tokens_per_s[1] < usual[1]
