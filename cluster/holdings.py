"""What a plan asks of each process: its experts, layer by layer, how many are in memory, and its speed. Pure.

Read by `cluster.forecast` and the simulator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.demand import Demand
from cluster.plan import ActorPlan, ServicePlan
from cluster.step_time import Seat
from cluster.topology import NodeFacts, Topology
from extraction.manifest import ExpertKey

Layer = tuple[str, int]
ROUTER = "router"
"""The name of the routers' own process."""


@dataclass(frozen=True)
class LayerShare:
    """One process's part of a layer, in uses per token."""

    num_experts: int
    uses: float
    missed: float
    """Of `uses`, those of experts that are not in memory."""
    expert_bytes: float
    """Mean over uses."""


@dataclass(frozen=True)
class Holding:
    """One process that answers for experts: a group's first actor, or the routers' own."""

    name: str
    seat: Seat
    group_bytes: int
    resident_bytes: int
    layers: Mapping[Layer, LayerShare]
    beside: int = 1
    """Processes of its node that answer for experts, this one included."""
    num_processes: int = 1
    """Of its node, the routers' own and replicas included, whatever they answer for."""
    num_cores: int = 1
    """Of its node."""

    def is_crowded(self, threads: int) -> bool:
        """Whether its node has more processes than cores for them. threads: with which one computes."""
        return self.num_processes * threads > self.num_cores


def holdings(
    plan: ServicePlan,
    topology: Topology,
    demand: Demand,
    *,
    has_hottest: bool = True,
) -> tuple[Holding, ...]:
    """The routers' process first, then the plan's actors, without replicas. An actor without a node is beside the
    router; processes of one node share its speed.

    has_hottest: whether those are in memory that are used most; if not, every expert is there as often as any other.
    """
    firsts: dict[str, ActorPlan] = {}
    for actor in plan.actors:
        firsts.setdefault(actor.group, actor)
    router = topology.node(topology.router_node)

    def host_of(actor: ActorPlan) -> NodeFacts:
        return topology.node(actor.node_id) if actor.node_id else router

    hosts = [host_of(actor) for actor in firsts.values()]
    processes = [router, *map(host_of, plan.actors)]
    computing = [*hosts, *([router] if plan.router_keys else [])]
    unowned = [key for group in plan.groups if group.name not in firsts for key in group.keys]
    own = (*plan.router_keys, *unowned)
    found = []
    for name, host, keys, budget in [
        (ROUTER, router, own, plan.router_budget_bytes),
        *(
            (actor.name, host, plan.group(actor.group).keys, actor.budget_bytes)
            for actor, host in zip(firsts.values(), hosts, strict=True)
        ),
    ]:
        beside = max(1, sum(other is host for other in computing))
        num_processes = sum(other is host for other in processes)
        layers, group_bytes, resident_bytes = _shares(keys, demand, budget, has_hottest)
        seat = _seat(host, 1 / beside, name == ROUTER)
        held = group_bytes, resident_bytes, layers
        found.append(Holding(name, seat, *held, beside, num_processes, host.num_cores))
    return tuple(found)


def resident_keys(keys: Iterable[ExpertKey], demand: Demand, budget_bytes: int | None) -> set[ExpertKey]:
    """The most used that fit a budget; None is no bound."""
    left = demand.total_bytes if budget_bytes is None else budget_bytes
    kept = set()
    for key in sorted(keys, key=lambda key: (-demand.uses[key], key)):
        if demand.sizes[key] > left:
            break
        left -= demand.sizes[key]
        kept.add(key)
    return kept


def _seat(node: NodeFacts, share: float, is_router: bool) -> Seat:
    can_read = node.has_store or node.disk_bytes > 0
    return Seat(
        node.node_id,
        0,
        is_router,
        node.room_bytes,
        node.room_bytes,
        1.0 / (node.expert_bytes_s * share),
        1.0 / (node.disk_bytes_s * share) if can_read else float("inf"),
        0.0 if is_router else 1.0 / node.bandwidth_bytes_s,
        0.0 if is_router else node.round_trip_s,
    )


def _shares(
    keys: tuple[ExpertKey, ...], demand: Demand, budget_bytes: int | None, has_hottest: bool
) -> tuple[dict[Layer, LayerShare], int, int]:
    """By layer, and the bytes of all keys and of those in memory."""
    group_bytes = sum(demand.sizes[key] for key in keys)
    kept = resident_keys(keys, demand, budget_bytes)
    resident_bytes = sum(demand.sizes[key] for key in kept)
    absent = 1.0 - resident_bytes / group_bytes if group_bytes else 0.0
    by_layer: dict[Layer, list[ExpertKey]] = {}
    for key in keys:
        by_layer.setdefault(key[:2], []).append(key)
    layers = {}
    for layer, members in by_layer.items():
        uses = sum(demand.uses[key] for key in members)
        weight = sum(demand.uses[key] * demand.sizes[key] for key in members)
        missed = sum(demand.uses[key] for key in members if key not in kept)
        mean_bytes = weight / uses if uses else 0.0
        layers[layer] = LayerShare(len(members), uses, missed if has_hottest else uses * absent, mean_bytes)
    return layers, group_bytes, resident_bytes
