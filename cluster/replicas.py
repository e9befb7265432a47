"""Second actors for groups, on other nodes, in the memory that is left: what takes over when the first is lost. Pure.

Called by `cluster.placement` once every expert has its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.demand import Demand
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.topology import NodeFacts, Topology

LEAST_SHARE = 4
"""A replica keeps at least one part in so many of its group in memory, or there is none."""


@dataclass
class _Left:
    """A node's memory, disk and places beside what was planned there, and the groups that have an actor on it."""

    node: NodeFacts
    memory_bytes: int
    disk_bytes: int
    groups: set[str]
    num_actors_left: int | None
    """None where memory alone bounds it."""

    def budget(self, group_bytes: int, least_bytes: int) -> int:
        """What a replica could keep in memory; 0 where it cannot be."""
        if self.num_actors_left is not None and self.num_actors_left < 1:
            return 0
        if self.memory_bytes >= group_bytes and self.disk_bytes >= group_bytes:
            return group_bytes
        on_disk = self.node.has_store or self.node.disk_bytes > 0
        is_enough = self.memory_bytes >= max(least_bytes, group_bytes // LEAST_SHARE)
        return self.memory_bytes if on_disk and is_enough and self.disk_bytes >= group_bytes else 0


def plan_replicas(
    topology: Topology,
    demand: Demand,
    plan: ServicePlan,
    current: ServicePlan | None,
    wanted: Mapping[str, int],
) -> list[ActorPlan]:
    """Actors to add to a plan until every group has as many as are wanted, hottest groups first, as far as there is
    room; those that have none come before all others.

    A replica that runs now stays where it is, if there is still room.
    """
    sizes = {group.name: sum(demand.sizes[key] for key in group.keys) for group in plan.groups}
    heat = {group.name: sum(demand.uses[key] for key in group.keys) for group in plan.groups}
    counts = Counter(actor.group for actor in plan.actors)
    nodes = [_left(node, topology, demand, plan, sizes) for node in topology.nodes if node.is_for_actors]
    nodes.sort(key=lambda left: left.node.node_id)
    names = {actor.name for actor in (*plan.actors, *(current.actors if current else ()))}
    there = {(actor.group, actor.node_id): actor.name for actor in (current.actors if current else ())}
    added: list[ActorPlan] = []
    for number in range(1, max(wanted.values(), default=0) + 1):
        for group in sorted(plan.groups, key=lambda group: (-heat[group.name], group.name)):
            if not counts[group.name] < number <= wanted[group.name]:
                continue
            actor = _replica(group, sizes[group.name], demand.largest_bytes, nodes, there, names)
            if actor is not None:
                added.append(actor)
                names.add(actor.name)
    return added


def _left(
    node: NodeFacts, topology: Topology, demand: Demand, plan: ServicePlan, sizes: dict[str, int]
) -> _Left:
    here = [actor for actor in plan.actors if actor.node_id == node.node_id]
    memory = node.room_bytes - sum(actor.budget_bytes or 0 for actor in here)
    held = sum(sizes[actor.group] for actor in here)
    if node.node_id == topology.router_node:
        memory -= plan.router_budget_bytes or 0
        held += sum(demand.sizes[key] for key in plan.router_keys)
    most = 2**62 if node.has_store else max(node.room_bytes, node.disk_bytes)
    places = None if node.most_actors is None else node.most_actors - len(here)
    return _Left(node, memory, most - held, {actor.group for actor in here}, places)


def _replica(
    group: ExpertGroup,
    group_bytes: int,
    least_bytes: int,
    nodes: Iterable[_Left],
    there: dict[tuple[str, str | None], str],
    names: set[str],
) -> ActorPlan | None:
    budgets = [
        (left, left.budget(group_bytes, least_bytes)) for left in nodes if group.name not in left.groups
    ]
    fitting = [(left, budget) for left, budget in budgets if budget > 0]
    if not fitting:
        return None
    left, budget = min(
        fitting,
        key=lambda pair: (
            (group.name, pair[0].node.node_id) not in there,
            -pair[1],
            -pair[0].memory_bytes,
            pair[0].node.node_id,
        ),
    )
    left.memory_bytes -= budget
    left.disk_bytes -= group_bytes
    left.groups.add(group.name)
    if left.num_actors_left is not None:
        left.num_actors_left -= 1
    fresh = (f"{group.name}-r{number}" for number in range(2, len(names) + 3))
    name = there.get((group.name, left.node.node_id)) or next(name for name in fresh if name not in names)
    return ActorPlan(name, group.name, left.node.node_id, budget)
