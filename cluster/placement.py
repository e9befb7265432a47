"""Which expert actor is responsible for which experts, and on which machine: a pure decision.

`place` plans a cluster of uneven machines (docs/placement.md), `plan_local` one machine with a given number of actors.
Called by whoever starts or changes a service, by `sage-moe plan`, and by the simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cluster.assignment import Trade, assign_by_expert
from cluster.demand import Demand
from cluster.layer_ranges import assign_by_layer
from cluster.layer_work import NOWHERE, Ints, Work, work_of
from cluster.plan import ActorPlan, CardShare, ExpertGroup, ServicePlan
from cluster.plan_time import expert_step_s
from cluster.replicas import plan_replicas
from cluster.step_time import MESSAGE_S, Seat
from cluster.topology import ACTORS_ON_A_CARD, NodeFacts, Topology
from extraction.manifest import ExpertKey, group_of

Grouping = Literal["expert", "layer"]
NO_LIMIT = 2**62
ROUTER_SHARE = 16
"""The routers' process keeps one part in so many of its machine's room, also where no expert is placed there."""


@dataclass(frozen=True)
class PlacementOptions:
    """What a plan is made for."""

    grouping: Grouping = "expert"
    """Every layer's experts over all machines, or whole layers to machines."""
    num_streams: int = 1
    """Tokens that are computed together in a step."""
    replicas: int = 2
    """Actors of a group, on different nodes, where room is left; hottest groups first."""
    actors_per_node: int = 1
    """On a node without GPUs other than the router's; with GPUs, one for each."""
    slack: float = 0.1
    """How far above its best possible time a layer may go to have experts on one actor that fire together."""
    message_s: float = MESSAGE_S
    """The router's own work for one message and its answer."""
    horizon_tokens: float = 100_000.0
    """Within which an expert's move must win back the time that its bytes take on the way."""
    least_gain: float = 0.1
    """Of a step's expected time with experts: what a machine that joins must win for others to give experts to it."""

    def __post_init__(self) -> None:
        if min(self.num_streams, self.replicas, self.actors_per_node) < 1:
            raise ValueError("num_streams, replicas and actors_per_node must be at least 1")
        if min(self.slack, self.message_s, self.horizon_tokens, self.least_gain) < 0:
            raise ValueError("slack, message_s, horizon_tokens and least_gain must not be negative")


DEFAULT_OPTIONS = PlacementOptions()


def place(
    topology: Topology,
    demand: Demand,
    current: ServicePlan | None = None,
    options: PlacementOptions = DEFAULT_OPTIONS,
) -> ServicePlan:
    """A plan for these machines. current: what runs now; little of it moves.

    Every expert is in one group or in the routers' process. No node is given more bytes than its room: what a group
    has beyond its actor's budget stays on the node's disk. Equal arguments give equal plans, in any order of nodes.
    Raises NoRoomForExperts.
    """
    seats = seats_of(topology, options.actors_per_node)
    work = work_of(demand, options.num_streams)
    names = _Names.of(seats, current)
    trade = Trade(options.slack, options.message_s, options.horizon_tokens / options.num_streams)
    assign = assign_by_expert if options.grouping == "expert" else assign_by_layer
    seat_X = assign(work, seats, _homes(work, seats, current), trade)
    plan = _planned(work, seats, seat_X, names)
    if current is None and demand.total_bytes <= seats[0].room_bytes:
        here = _planned(work, seats, np.zeros_like(seat_X), names)
        if expert_step_s(here, topology, demand, options) <= expert_step_s(plan, topology, demand, options):
            plan = here  # its messages would cost more than the others save
    wanted = {group.name: options.replicas for group in plan.groups}
    replicas = plan_replicas(topology, demand, plan, current, wanted)
    plan = replace(plan, actors=(*plan.actors, *replicas))
    return _give_rest_to_router(topology, share_gpus(topology, plan))


def seats_of(topology: Topology, actors_per_node: int = 1) -> tuple[Seat, ...]:
    """The routers' process first, then by node: one for each GPU, or as many as are asked for."""
    router = topology.node(topology.router_node)
    seats = [_seat(router, 0, 1.0, True)]
    for node in sorted(topology.nodes, key=lambda node: node.node_id):
        if node.node_id == router.node_id:
            continue
        memory = [gpu.memory_bytes for gpu in node.gpus] or [1] * actors_per_node
        seats += [_seat(node, index, part / sum(memory), False) for index, part in enumerate(memory)]
    return tuple(seats)


def _seat(node: NodeFacts, index: int, share: float, is_router: bool) -> Seat:
    """share: of the node's memory, disk and speed."""
    room = int(node.room_bytes * share)
    most = NO_LIMIT if node.has_store else max(room, int(node.disk_bytes * share))
    return Seat(
        node.node_id,
        index,
        is_router,
        room,
        most,
        1.0 / (node.expert_bytes_s * share),
        1.0 / (node.disk_bytes_s * share) if most > room else float("inf"),
        0.0 if is_router else 1.0 / node.bandwidth_bytes_s,
        0.0 if is_router else node.round_trip_s,
    )


@dataclass(frozen=True)
class _Names:
    """What the groups and actors of seats are called: as now, or a number that was not used."""

    groups: tuple[str, ...]
    actors: tuple[str, ...]

    @classmethod
    def of(cls, seats: Sequence[Seat], current: ServicePlan | None) -> _Names:
        there = _firsts(current)
        taken = {actor.name for actor in current.actors} if current else set()
        taken |= {group.name for group in current.groups} if current else set()
        fresh = (
            name for name in (f"experts-{n}" for n in range(len(seats) + len(taken))) if name not in taken
        )
        groups, actors = [], []
        for seat in seats:
            actor = there.get((seat.node_id, seat.index)) if not seat.is_router else None
            name = next(fresh) if actor is None and not seat.is_router else ""
            groups.append(name if actor is None else actor.group)
            actors.append(name if actor is None else actor.name)
        return cls(tuple(groups), tuple(actors))


def _homes(work: Work, seats: Sequence[Seat], current: ServicePlan | None) -> Ints:
    """(X,) the seat on whose node each expert is now, or NOWHERE."""
    home_X = np.full(len(work.keys), NOWHERE, dtype=np.int64)
    if current is None:
        return home_X
    number_of = {(seat.node_id, seat.index): number for number, seat in enumerate(seats)}
    home_of = dict.fromkeys(current.router_keys, 0)
    for (node_id, index), actor in _firsts(current).items():
        number = number_of.get((node_id, index), number_of.get((node_id, 0), NOWHERE))
        home_of |= dict.fromkeys(current.group(actor.group).keys, number)
    for number, key in enumerate(work.keys):
        home_X[number] = home_of.get(key, NOWHERE)
    return home_X


def _firsts(current: ServicePlan | None) -> dict[tuple[str, int], ActorPlan]:
    """The first actor of each group, by its node and its number there."""
    firsts: dict[str, ActorPlan] = {}
    for actor in current.actors if current else ():
        firsts.setdefault(actor.group, actor)
    by_seat: dict[tuple[str, int], ActorPlan] = {}
    counts: dict[str, int] = {}
    for actor in firsts.values():
        if actor.node_id is not None:
            index = counts[actor.node_id] = counts.get(actor.node_id, -1) + 1
            by_seat[actor.node_id, index] = actor
    return by_seat


def _planned(work: Work, seats: Sequence[Seat], seat_X: Ints, names: _Names) -> ServicePlan:
    keys: list[list[ExpertKey]] = [[] for _ in seats]
    sizes = [0] * len(seats)
    for key, num_bytes, seat in zip(work.keys, work.bytes_X.tolist(), seat_X.tolist(), strict=True):
        keys[seat].append(key)
        sizes[seat] += num_bytes
    groups, actors = [], []
    for number, seat in enumerate(seats):
        if keys[number] and not seat.is_router:
            groups.append(ExpertGroup(names.groups[number], tuple(keys[number]), seat.node_id))
            budget = min(sizes[number], seat.room_bytes)
            actors.append(ActorPlan(names.actors[number], names.groups[number], seat.node_id, budget))
    room, least = seats[0].room_bytes, max(work.bytes_X.tolist(), default=0)
    # Whatever else is placed on their machine, routers compute what is lost elsewhere.
    budget = max(min(sizes[0], room), min(room, max(least, room // ROUTER_SHARE)))
    return ServicePlan(tuple(groups), tuple(actors), tuple(keys[0]), budget)


def share_gpus(topology: Topology, plan: ServicePlan) -> ServicePlan:
    """Every actor on a node with GPUs computes there: it has a share of one and of host memory behind it, the same
    however many others come: at most `NodeFacts.most_actors` do."""
    shares = {node.node_id: _card_share(node) for node in topology.nodes}
    actors = tuple(
        replace(actor, num_gpus=0.0, host_budget_bytes=None).on_card(shares.get(actor.node_id or ""))
        for actor in plan.actors
    )
    return replace(plan, actors=actors)


def _card_share(node: NodeFacts) -> CardShare | None:
    if not node.gpus:
        return None
    return CardShare(1 / ACTORS_ON_A_CARD, node.behind_bytes // (ACTORS_ON_A_CARD * len(node.gpus)))


def _give_rest_to_router(topology: Topology, plan: ServicePlan) -> ServicePlan:
    """What nobody else takes of their machine's memory is the routers'."""
    router = topology.router_node
    taken = sum(actor.budget_bytes or 0 for actor in plan.actors if actor.node_id == router)
    return replace(plan, router_budget_bytes=topology.node(router).room_bytes - taken)


def split_experts(keys: Sequence[ExpertKey], num_groups: int) -> list[tuple[ExpertKey, ...]]:
    """Deal the experts of each layer out to `num_groups` groups, so that every layer's work is spread evenly.

    Returns groups of sorted keys; together they hold every key once. Raises ValueError for no group.
    """
    if num_groups < 1:
        raise ValueError(f"{num_groups} groups cannot hold {len(keys)} experts")
    groups: list[list[ExpertKey]] = [[] for _ in range(num_groups)]
    for key in sorted(keys):
        groups[group_of(key, num_groups)].append(key)
    return [tuple(group) for group in groups]


def plan_local(
    keys: Sequence[ExpertKey],
    num_actors: int,
    budgets: Sequence[int] = (),
    card_share: CardShare | None = None,
) -> ServicePlan:
    """The plan of one machine: `split_experts` over actors `experts-0`, `experts-1`, ...; Ray chooses their node.

    budgets: bytes of experts that each actor keeps, in the order of the actors; none means no bound. card_share: what
    each has of a card, on which it then computes. Without actors
    the routers' own process keeps every expert. Raises ValueError for another number of budgets than actors.
    """
    if budgets and len(budgets) != num_actors:
        raise ValueError(f"{len(budgets)} budgets for {num_actors} actors")
    if num_actors == 0:
        return ServicePlan((), (), tuple(sorted(keys)))
    groups = tuple(
        ExpertGroup(f"experts-{index}", group) for index, group in enumerate(split_experts(keys, num_actors))
    )
    actors = (
        ActorPlan(group.name, group.name, budget_bytes=budgets[index] if budgets else None)
        for index, group in enumerate(groups)
    )
    return ServicePlan(groups, tuple(actor.on_card(card_share) for actor in actors))
