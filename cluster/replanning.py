"""The plan after machines have come or gone: what is lost finds another place, and what runs stays as it is. Pure.

`cluster.placement.place` divides all experts anew; while a service runs that would replace actors whose machines have
no room for two. Here every group keeps its experts: a group whose actors are gone gets one where there is room, or
waits for a machine; a machine that holds nothing gets what waits, then what the routers' memory does not hold, then
second actors of the hottest groups. Called by `cluster.node_watch`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from cluster.demand import Demand
from cluster.errors import NoRoomForExperts
from cluster.placement import PlacementOptions, place, share_gpus
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.replicas import plan_replicas
from cluster.topology import Topology
from extraction.manifest import ExpertKey


def place_again(
    topology: Topology, demand: Demand, current: ServicePlan, options: PlacementOptions
) -> ServicePlan:
    """topology: the machines that there are now; rooms as for `place`. current: with the nodes where its actors run,
    None for one that waits for a machine.

    Actors on machines that are still there stay as they are. Equal arguments give equal plans.
    """
    there = {node.node_id for node in topology.nodes}
    plan = replace(current, actors=tuple(actor for actor in current.actors if actor.node_id in there))
    plan = _add(topology, plan, plan_replicas(topology, demand, plan, current, 1))
    plan = _spread_overflow(topology, demand, plan, options)
    plan = _add(topology, plan, plan_replicas(topology, demand, plan, current, options.replicas))
    served = {actor.group for actor in plan.actors}
    waiting = [_waiting(group, demand, current) for group in plan.groups if group.name not in served]
    return replace(plan, actors=(*plan.actors, *waiting))


def _add(topology: Topology, plan: ServicePlan, actors: Collection[ActorPlan]) -> ServicePlan:
    """Those that were there keep their shares of GPUs."""
    if not actors:
        return plan
    new = {actor.name for actor in actors}
    shared = share_gpus(topology, replace(plan, actors=(*plan.actors, *actors)))
    added = (actor for actor in shared.actors if actor.name in new)
    return replace(plan, actors=(*plan.actors, *added))


def _waiting(group: ExpertGroup, demand: Demand, current: ServicePlan) -> ActorPlan:
    """An actor that is to start when a machine has room for it, under the name that the group's first one had."""
    before = next((actor.name for actor in current.actors if actor.group == group.name), group.name)
    return ActorPlan(before, group.name, None, sum(demand.sizes[key] for key in group.keys))


def _spread_overflow(
    topology: Topology, demand: Demand, plan: ServicePlan, options: PlacementOptions
) -> ServicePlan:
    """Move what the routers' memory does not hold to machines that hold nothing."""
    budget_bytes = plan.router_budget_bytes
    own_bytes = sum(demand.sizes[key] for key in plan.router_keys)
    used = {actor.node_id for actor in plan.actors}
    unused = [
        node
        for node in topology.nodes
        if node.node_id not in used
        and node.node_id != topology.router_node
        and node.room_bytes >= demand.largest_bytes
    ]
    if budget_bytes is None or own_bytes <= budget_bytes or not unused:
        return plan
    router = replace(topology.node(topology.router_node), room_bytes=budget_bytes)
    try:
        spread = place(
            Topology((router, *unused), router.node_id),
            _only(demand, plan.router_keys),
            None,
            replace(options, replicas=1),
        )
    except NoRoomForExperts:
        return plan
    names = _fresh_names(spread, plan)
    groups = tuple(replace(group, name=names[group.name]) for group in spread.groups)
    actors = tuple(
        replace(actor, name=names[actor.group], group=names[actor.group]) for actor in spread.actors
    )
    return replace(
        plan,
        groups=(*plan.groups, *groups),
        actors=(*plan.actors, *actors),
        router_keys=spread.router_keys,
    )


def _only(demand: Demand, keys: Collection[ExpertKey]) -> Demand:
    kept = frozenset(keys)
    return Demand(
        {key: demand.sizes[key] for key in keys},
        {key: demand.uses[key] for key in keys},
        demand.row_bytes,
        {pair: uses for pair, uses in demand.together.items() if kept.issuperset(pair)},
    )


def _fresh_names(spread: ServicePlan, plan: ServicePlan) -> dict[str, str]:
    """For new groups and their actors, each a name that nobody has."""
    taken = {group.name for group in plan.groups} | {actor.name for actor in plan.actors}
    most = len(taken) + len(spread.groups)
    fresh = (name for number in range(most) if (name := f"experts-{number}") not in taken)
    return {group.name: next(fresh) for group in spread.groups}
