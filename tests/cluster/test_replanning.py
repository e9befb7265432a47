"""The plan after machines have come or gone: nothing is lost, nothing moves that need not, and no machine gets more
than it has room for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.demand import Demand, uniform_demand
from cluster.placement import PlacementOptions, place
from cluster.plan import ServicePlan
from cluster.plan_time import expert_step_s, overflow_bytes
from cluster.replanning import place_again
from cluster.replicas import LEAST_SHARE
from cluster.topology import NodeFacts, Topology
from tests.cluster.clusters import EXPERT_BYTES, cluster, even_demand, keys_of, node, node_of, skewed_demand

OPTIONS = PlacementOptions()
LONE = PlacementOptions(replicas=1)
FREE_MESSAGES = PlacementOptions(replicas=1, message_s=0.0)
"""Made-up experts take a microsecond, which a message's own time would hide."""


def _new(before: Topology, after: Topology) -> frozenset[str]:
    """Machines that join."""
    return frozenset(node.node_id for node in after.nodes) - {node.node_id for node in before.nodes}


@st.composite
def changes(draw: st.DrawFn) -> tuple[Topology, Topology, Demand]:
    """Machines before and after; the first one, with the router and the store, stays."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 10))
    demand = skewed_demand(layers, experts, draw(st.integers(1, experts)), draw(st.integers(0, 99)))
    nodes = [
        node(
            f"n{number}",
            draw(st.integers(1 if number == 0 else 0, layers * experts + 2)),
            round_trip_s=draw(st.sampled_from([1e-8, 1e-6])),
            has_store=number == 0 or draw(st.booleans()),
            disk=draw(st.integers(0, 20)),
        )
        for number in range(draw(st.integers(2, 6)))
    ]
    before, after = (
        [nodes[0], *(each for each in nodes[1:] if draw(st.booleans()))] for _ in ("before", "after")
    )
    return cluster(*before), cluster(*after), demand


@given(changes(), st.integers(1, 3))
def test_no_expert_is_lost_and_no_machine_gets_more_than_its_room(
    case: tuple[Topology, Topology, Demand], replicas: int
) -> None:
    before, after, demand = case
    options = PlacementOptions(replicas=replicas)
    plan = place_again(after, demand, place(before, demand, None, options), options, _new(before, after))
    placed = [*plan.router_keys, *(key for group in plan.groups for key in group.keys)]
    assert sorted(placed) == sorted(demand.sizes)
    assert {actor.group for actor in plan.actors} == {group.name for group in plan.groups}
    taken = Counter({after.router_node: plan.router_budget_bytes or 0})
    for actor in plan.actors:
        assert actor.budget_bytes is not None and actor.budget_bytes >= EXPERT_BYTES
        if actor.node_id is not None:
            taken[actor.node_id] += actor.budget_bytes
    assert all(num_bytes <= after.node(name).room_bytes for name, num_bytes in taken.items())
    for group in plan.groups:
        nodes = [actor.node_id for actor in plan.actors if actor.group == group.name]
        assert len(set(nodes)) == len(nodes)


@given(changes())
def test_what_runs_on_a_machine_that_stays_stays_as_it_is(case: tuple[Topology, Topology, Demand]) -> None:
    before, after, demand = case
    plan = place(before, demand, None, OPTIONS)
    again = place_again(after, demand, plan, OPTIONS, _new(before, after))
    there = {each.node_id for each in after.nodes}
    stayed = [actor for actor in plan.actors if actor.node_id in there]
    running = {actor.name: actor for actor in again.actors}
    left = {group.name: set(group.keys) for group in again.groups}
    for group in plan.groups:
        assert left.get(group.name, set()) <= set(group.keys)
    for actor in stayed:
        if actor.group in left:
            now = running[actor.name]
            assert (now.group, now.node_id) == (actor.group, actor.node_id)
            assert (now.budget_bytes or 0) <= (actor.budget_bytes or 0)
    assert again.router_budget_bytes == plan.router_budget_bytes
    assert set(again.router_keys) <= set(plan.router_keys)


@given(changes(), st.integers(1, 3), st.booleans())
def test_group_is_moved_only_to_where_a_quarter_of_it_finds_memory(
    case: tuple[Topology, Topology, Demand], replicas: int, is_scaled: bool
) -> None:
    before, after, demand = case
    options = PlacementOptions(replicas=replicas)
    plan = place(before, demand, None, options)
    again = place_again(after, demand, plan, options, _new(before, after), is_scaled=is_scaled)
    stayed = {(actor.name, actor.node_id) for actor in plan.actors}
    old = {group.name for group in plan.groups}
    for actor in again.actors:
        if actor.group in old and actor.node_id is not None and (actor.name, actor.node_id) not in stayed:
            size = len(again.group(actor.group).keys) * EXPERT_BYTES
            assert (actor.budget_bytes or 0) >= max(EXPERT_BYTES, size // LEAST_SHARE)


@given(changes())
def test_experts_are_given_to_machines_that_join_and_only_where_it_helps(
    case: tuple[Topology, Topology, Demand],
) -> None:
    before, after, demand = case
    plan = place(before, demand, None, LONE)
    joined = _new(before, after)
    after = cluster(*before.nodes, *(each for each in after.nodes if each.node_id in joined))
    without, given = (place_again(after, demand, plan, FREE_MESSAGES, new) for new in ((), joined))
    if [group.keys for group in given.groups] == [group.keys for group in without.groups]:
        return
    assert overflow_bytes(given, after, demand) < overflow_bytes(without, after, demand) or expert_step_s(
        given, after, demand, FREE_MESSAGES
    ) < 0.9 * expert_step_s(without, after, demand, FREE_MESSAGES)
    assert {group.home for group in given.groups[len(without.groups) :]} <= joined


@given(changes(), st.data())
def test_groups_keep_the_numbers_of_actors_that_the_load_has_given_them(
    case: tuple[Topology, Topology, Demand], data: st.DataObject
) -> None:
    before, after, demand = case
    plan = place(before, demand, None, OPTIONS)
    plan = replace(plan, actors=tuple(actor for actor in plan.actors if data.draw(st.booleans())))
    again = place_again(after, demand, plan, OPTIONS, _new(before, after), is_scaled=True)
    counts, now = (Counter(actor.group for actor in each.actors) for each in (plan, again))
    for group in plan.groups:
        if group.name in {each.name for each in again.groups}:
            assert min(1, counts[group.name]) <= now[group.name] <= counts[group.name]
    placed = [*again.router_keys, *(key for group in again.groups for key in group.keys)]
    assert sorted(placed) == sorted(demand.sizes)


@given(changes(), st.randoms(use_true_random=False))
def test_plan_depends_on_nothing_but_its_arguments_and_is_left_alone_by_a_second_look(
    case: tuple[Topology, Topology, Demand], random: np.random.Generator
) -> None:
    before, after, demand = case
    plan = place(before, demand, None, OPTIONS)
    joined = _new(before, after)
    again = place_again(after, demand, plan, OPTIONS, joined)
    nodes: list[NodeFacts] = list(after.nodes)
    random.shuffle(nodes)
    assert place_again(Topology(tuple(nodes), after.router_node), demand, plan, OPTIONS, joined) == again
    assert place_again(after, demand, again, OPTIONS) == again


def _three(room: int) -> tuple[Topology, Demand, ServicePlan]:
    """A router without room for experts, and two machines that have half of them each."""
    demand = even_demand(2, 8, 2)
    topology = cluster(node("a", 0, has_store=True), node("b", room), node("c", room))
    return topology, demand, place(topology, demand, None, LONE)


def test_lost_machine_s_group_goes_whole_to_a_survivor_with_room() -> None:
    topology, demand, plan = _three(16)
    after = cluster(*topology.nodes[:2])
    again = place_again(after, demand, plan, LONE)
    assert set(node_of(again, after).values()) == {"b"}
    assert [group.keys for group in again.groups] == [group.keys for group in plan.groups]
    (stays,) = (actor for actor in plan.actors if actor.node_id == "b")
    assert stays in again.actors


def test_lost_machine_s_group_waits_where_nobody_has_room_and_goes_to_the_machine_that_joins() -> None:
    topology, demand, plan = _three(8)
    again = place_again(cluster(*topology.nodes[:2]), demand, plan, LONE)
    (lost,) = (actor for actor in plan.actors if actor.node_id == "c")
    (waiting,) = (actor for actor in again.actors if actor.node_id is None)
    assert (waiting.group, waiting.budget_bytes) == (lost.group, 8 * EXPERT_BYTES)
    joined = cluster(*topology.nodes[:2], node("d", 8))
    healed = place_again(joined, demand, again, LONE, {"d"})
    assert {actor.group: actor.node_id for actor in healed.actors}[lost.group] == "d"
    assert all(actor.node_id is not None for actor in healed.actors)


def test_replica_of_a_lost_group_is_enough_and_a_new_one_is_made_where_memory_is_left() -> None:
    demand = even_demand(2, 8, 2)
    topology = cluster(node("a", 0, has_store=True), node("b", 16), node("c", 16))
    plan = place(topology, demand, None, OPTIONS)
    assert Counter(actor.node_id for actor in plan.actors) == {"b": 2, "c": 2}
    alone = cluster(*topology.nodes[:2])
    again = place_again(alone, demand, plan, OPTIONS)
    assert {actor.node_id for actor in again.actors} == {"b"}
    assert again.actors == tuple(actor for actor in plan.actors if actor.node_id == "b")
    more = place_again(cluster(*topology.nodes[:2], node("d", 16)), demand, again, OPTIONS, {"d"})
    assert Counter(actor.node_id for actor in more.actors) == {"b": 2, "d": 2}


def test_machine_that_joins_takes_what_the_router_s_memory_does_not_hold() -> None:
    demand = skewed_demand(2, 8, 2)
    alone = cluster(node("a", 6, has_store=True))
    plan = place(alone, demand, None, OPTIONS)
    assert len(plan.router_keys) == 16 and not plan.actors
    again = place_again(cluster(*alone.nodes, node("b", 20)), demand, plan, OPTIONS, {"b"})
    assert len(again.router_keys) <= 6
    (actor,) = again.actors
    assert (actor.node_id, actor.name) == ("b", "experts-0")
    coldest_here = min(demand.uses[key] for key in again.router_keys)
    layer = again.router_keys[0].layer
    sent = [demand.uses[key] for key in again.groups[0].keys if key.layer == layer]
    assert coldest_here >= min(sent)


def test_machine_that_joins_takes_its_part_where_that_wins_more_than_it_costs() -> None:
    demand = even_demand(2, 8, 2)
    topology = cluster(node("a", 0, has_store=True), node("b", 20))
    plan = place(topology, demand, None, FREE_MESSAGES)
    joined = cluster(*topology.nodes, node("c", 20))
    again = place_again(joined, demand, plan, FREE_MESSAGES, {"c"})
    (kept, new) = again.groups
    assert (kept.name, kept.home, new.home) == ("experts-0", "b", "c")
    assert len(kept.keys) == len(new.keys) == 8
    (stays, comes) = again.actors
    assert (stays.name, stays.node_id, stays.budget_bytes) == ("experts-0", "b", 8 * EXPERT_BYTES)
    assert (comes.group, comes.node_id, comes.budget_bytes) == (new.name, "c", 8 * EXPERT_BYTES)


@pytest.mark.parametrize(("num_streams", "num_groups"), [(64, 5), (1, 4)])
def test_fifth_machine_takes_its_part_of_a_large_model_where_many_streams_run(
    num_streams: int, num_groups: int
) -> None:
    """Qwen3-30B-A3B on desktops. With one stream another message in every layer costs more than it saves."""
    demand = uniform_demand(dict.fromkeys(keys_of(48, 128), 9 * 2**20), 8, 4096)
    named = (("a", 8), *((name, 16) for name in "bcdef"))
    nodes = [
        NodeFacts(name, name, size * 2**30, 8, 25e9, 1.25e9, 150e-6, disk_bytes_s=2e9, has_store=True)
        for name, size in named
    ]
    options = PlacementOptions(num_streams=num_streams)
    plan = place(cluster(*nodes[:5]), demand, None, options)
    again = place_again(cluster(*nodes), demand, plan, options, {"f"})
    assert len(plan.groups) == 4 and len(again.groups) == num_groups


@pytest.mark.parametrize(
    "options", [PlacementOptions(replicas=1), replace(FREE_MESSAGES, least_gain=0.9)], ids=["message", "gain"]
)
def test_machine_that_joins_gets_nothing_where_its_messages_cost_more_or_too_little_is_won(
    options: PlacementOptions,
) -> None:
    demand = even_demand(2, 8, 2)
    topology = cluster(node("a", 0, has_store=True), node("b", 20))
    plan = place(topology, demand, None, options)
    joined = cluster(*topology.nodes, node("c", 20))
    assert place_again(joined, demand, plan, options, {"c"}) == plan


def test_experts_that_are_given_to_a_machine_while_nobody_asks_for_them_start_no_actor() -> None:
    demand = even_demand(2, 8, 2)
    topology = cluster(node("a", 0, has_store=True), node("b", 20))
    idle = replace(place(topology, demand, None, FREE_MESSAGES), actors=())
    joined = cluster(*topology.nodes, node("c", 20))
    again = place_again(joined, demand, idle, FREE_MESSAGES, {"c"}, is_scaled=True)
    assert not again.actors
    assert {group.home for group in again.groups} == {"b", "c"}


def test_actor_that_waited_and_now_runs_somewhere_stays_there() -> None:
    topology, demand, plan = _three(8)
    again = place_again(cluster(*topology.nodes[:2]), demand, plan, LONE)
    runs = tuple(replace(actor, node_id=actor.node_id or "d") for actor in again.actors)
    joined = cluster(*topology.nodes[:2], node("d", 8))
    assert place_again(joined, demand, replace(again, actors=runs), LONE).actors == runs
