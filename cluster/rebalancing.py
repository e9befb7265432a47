"""What machines that join take over from those that are there. Pure.

Whoever is there only gives: its actor goes on as it is and answers for fewer experts, so that no machine has to hold a
group twice while it changes hands. Called by `cluster.replanning`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from cluster.demand import Demand
from cluster.errors import NoRoomForExperts
from cluster.holdings import resident_keys
from cluster.placement import PlacementOptions, place
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.plan_time import expert_step_s, overflow_bytes
from cluster.topology import Topology
from extraction.manifest import ExpertKey


def give_to_joined(
    topology: Topology,
    demand: Demand,
    plan: ServicePlan,
    options: PlacementOptions,
    joined: Collection[str],
    idle: Collection[str] = (),
) -> ServicePlan:
    """The plan in which machines of `joined` that hold nothing yet have groups of their own, of experts that others
    give away; as it was, unless more experts are in memory then, or a step is expected to be faster by more than
    `options.least_gain` of it.

    idle: groups that are to have no actor. A new group has one, unless all that gave to it are idle.
    """
    takers = _takers(topology, demand, plan, joined)
    if not takers:
        return plan
    running = _all_running(topology, demand, plan)
    held = _as_held(topology, running, takers)
    try:
        ideal = place(held, demand, _in_memory(running, demand), replace(options, replicas=1))
    except NoRoomForExperts:
        return plan
    given = _give(running, ideal, demand, takers)
    if not _is_better(topology, demand, running, given, options):
        return plan
    unasked = {key for name in idle for key in plan.group(name).keys}
    actors = tuple(actor for actor in given.actors if not unasked.issuperset(given.group(actor.group).keys))
    return replace(given, actors=actors)


def _is_better(
    topology: Topology, demand: Demand, plan: ServicePlan, given: ServicePlan, options: PlacementOptions
) -> bool:
    if overflow_bytes(given, topology, demand) < overflow_bytes(plan, topology, demand):
        return True
    time_s, given_s = (expert_step_s(each, topology, demand, options) for each in (plan, given))
    return given_s < time_s * (1.0 - options.least_gain)


def _takers(topology: Topology, demand: Demand, plan: ServicePlan, joined: Collection[str]) -> frozenset[str]:
    used = {actor.node_id for actor in plan.actors} | {group.home for group in plan.groups}
    return frozenset(
        node.node_id
        for node in topology.nodes
        if node.node_id in joined
        and node.node_id not in used
        and node.node_id != topology.router_node
        and node.room_bytes >= demand.largest_bytes
    )


def _firsts(plan: ServicePlan) -> dict[str, ActorPlan]:
    firsts: dict[str, ActorPlan] = {}
    for actor in plan.actors:
        firsts.setdefault(actor.group, actor)
    return firsts


def _all_running(topology: Topology, demand: Demand, plan: ServicePlan) -> ServicePlan:
    """With an actor also for groups that have none now, on the machines that they were made for."""
    left = {node.node_id: node.room_bytes for node in topology.nodes}
    for actor in plan.actors:
        if actor.node_id in left:
            left[actor.node_id] -= actor.budget_bytes or 0
    firsts, idle = _firsts(plan), []
    for group in plan.groups:
        if group.name not in firsts and group.home in left:
            budget = max(0, min(left[group.home], sum(demand.sizes[key] for key in group.keys)))
            left[group.home] -= budget
            idle.append(ActorPlan(f"idle {group.name}", group.name, group.home, budget))
    return replace(plan, actors=(*plan.actors, *idle))


def _as_held(topology: Topology, plan: ServicePlan, takers: Collection[str]) -> Topology:
    """The machines with the room that their own groups have: what replicas have there is not to be given away."""
    held = {node.node_id: 0 for node in topology.nodes}
    held[topology.router_node] = plan.router_budget_bytes or 0
    for actor in _firsts(plan).values():
        if actor.node_id in held:
            held[actor.node_id] += actor.budget_bytes or 0
    nodes = (
        node if node.node_id in takers else replace(node, room_bytes=held[node.node_id])
        for node in topology.nodes
    )
    return replace(topology, nodes=tuple(nodes))


def _in_memory(plan: ServicePlan, demand: Demand) -> ServicePlan:
    """What has a place that is worth keeping."""
    budgets = {name: actor.budget_bytes for name, actor in _firsts(plan).items()}
    groups = (
        replace(group, keys=_resident(group.keys, demand, budgets.get(group.name))) for group in plan.groups
    )
    own = _resident(plan.router_keys, demand, plan.router_budget_bytes)
    return replace(plan, groups=tuple(groups), router_keys=own)


def _resident(keys: tuple[ExpertKey, ...], demand: Demand, budget_bytes: int | None) -> tuple[ExpertKey, ...]:
    kept = resident_keys(keys, demand, budget_bytes)
    return tuple(key for key in keys if key in kept)


def _give(plan: ServicePlan, ideal: ServicePlan, demand: Demand, takers: Collection[str]) -> ServicePlan:
    """What an ideal plan has on the machines that take, and of the plan what is left of it."""
    takes = [(actor, ideal.group(actor.group)) for actor in ideal.actors if actor.node_id in takers]
    taken = frozenset(key for _, group in takes for key in group.keys)
    groups, actors = list(_without(plan.groups, taken)), []
    sizes = {group.name: sum(demand.sizes[key] for key in group.keys) for group in groups}
    for actor in plan.actors:
        if actor.group in sizes:
            budget = None if actor.budget_bytes is None else min(actor.budget_bytes, sizes[actor.group])
            actors.append(replace(actor, budget_bytes=budget))
    for (actor, group), name in zip(takes, _fresh_names(plan), strict=False):
        groups.append(replace(group, name=name))
        actors.append(replace(actor, name=name, group=name))
    own = tuple(key for key in plan.router_keys if key not in taken)
    return replace(plan, groups=tuple(groups), actors=tuple(actors), router_keys=own)


def _without(groups: Iterable[ExpertGroup], taken: Collection[ExpertKey]) -> Iterator[ExpertGroup]:
    for group in groups:
        keys = tuple(key for key in group.keys if key not in taken)
        if keys:
            yield replace(group, keys=keys)


def _fresh_names(plan: ServicePlan) -> Iterator[str]:
    """For new groups and their actors: names that nobody has."""
    taken = {group.name for group in plan.groups} | {actor.name for actor in plan.actors}
    number = 0
    while True:
        if (name := f"experts-{number}") not in taken:
            yield name
        number += 1
