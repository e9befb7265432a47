"""The plan after machines have come or gone: what is lost finds another place, and what runs goes on. Pure.

`cluster.placement.place` divides all experts anew; while a service runs that would replace actors whose machines have
no room for two. Here a group whose actors are gone gets one where there is room, or waits for a machine; a machine that
joins gets what waits, then what others give away (`cluster.rebalancing`), then second actors of the hottest groups.
Called by `cluster.node_watch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from cluster.demand import Demand
from cluster.placement import PlacementOptions, share_gpus
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.rebalancing import give_to_joined
from cluster.replicas import plan_replicas
from cluster.topology import Topology


def place_again(
    topology: Topology,
    demand: Demand,
    current: ServicePlan,
    options: PlacementOptions,
    joined: Collection[str] = (),
    *,
    is_scaled: bool = False,
) -> ServicePlan:
    """topology: the machines that there are now; rooms as for `place`. current: with the nodes where its actors run,
    None for one that waits for a machine. joined: machines that the plan was not made for. is_scaled: whether the
    number of a group's actors follows the load: it then stays what it is, and `options.replicas` means nothing.

    Actors on machines that are still there stay where they are. Equal arguments give equal plans.
    """
    there = {node.node_id for node in topology.nodes}
    kept = tuple(actor for actor in current.actors if actor.node_id in there)
    groups = tuple(group if group.home in there else replace(group, home=None) for group in current.groups)
    plan = replace(current, groups=groups, actors=kept)
    counts = Counter(actor.group for actor in current.actors)
    wanted = {group.name: counts[group.name] if is_scaled else options.replicas for group in plan.groups}
    plan = _add(topology, plan, plan_replicas(topology, demand, plan, current, _at_most_one(wanted)))
    idle = [name for name, number in wanted.items() if not number]
    plan = share_gpus(topology, give_to_joined(topology, demand, plan, options, joined, idle))
    new = {group.name for group in plan.groups} - wanted.keys()
    wanted |= {name: _is_run(plan, name) if is_scaled else options.replicas for name in new}
    plan = _add(topology, plan, plan_replicas(topology, demand, plan, current, wanted))
    served = {actor.group for actor in plan.actors}
    unserved = [group for group in plan.groups if wanted[group.name] and group.name not in served]
    plan = replace(plan, actors=(*plan.actors, *(_waiting(group, demand, current) for group in unserved)))
    return replace(plan, groups=tuple(_at_home(group, plan) for group in plan.groups))


def _add(topology: Topology, plan: ServicePlan, actors: Collection[ActorPlan]) -> ServicePlan:
    return share_gpus(topology, replace(plan, actors=(*plan.actors, *actors)))


def _at_most_one(wanted: Mapping[str, int]) -> dict[str, int]:
    return {name: min(1, number) for name, number in wanted.items()}


def _is_run(plan: ServicePlan, group: str) -> bool:
    return any(actor.group == group for actor in plan.actors)


def _at_home(group: ExpertGroup, plan: ServicePlan) -> ExpertGroup:
    """A group whose home is gone is at home where it runs."""
    here = (actor.node_id for actor in plan.actors if actor.group == group.name and actor.node_id)
    return replace(group, home=group.home or next(here, None))


def _waiting(group: ExpertGroup, demand: Demand, current: ServicePlan) -> ActorPlan:
    """An actor that is to start when a machine has room for it, under the name that the group's first one had."""
    before = next((actor.name for actor in current.actors if actor.group == group.name), group.name)
    return ActorPlan(before, group.name, None, sum(demand.sizes[key] for key in group.keys))
