"""How many actors answer for each group, and where: decided from load, demand, trust, capacity and room. Pure.

Demand comes first: a group that is asked for has an actor, one whose actors are busy gets a replica. Trust decides
between groups that are asked for equally. What nobody asks for gives way: its actor shrinks to the disk tier where
others need the room, and is drained when it has been idle for long. `decide` says what to change and why;
`carry_out` makes a plan of it, which `cluster.supervisor` brings about; the simulator drives the same two functions.

Nothing swings: a load must have been high or low for a while, and a group that was changed is left alone for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.capacity import CapacityState, num_actors_at
from cluster.plan import ActorPlan, ServicePlan
from cluster.scaling_room import NodeLoad, Rooms

Kind = Literal["spawn", "replicate", "move", "drain", "shrink", "grow"]


@dataclass(frozen=True)
class ScalerSettings:
    """When to change what. Times in seconds."""

    max_actors: int
    min_actors: int = 0
    high_busy: float = 0.6
    """Of its time that an actor computes, above which its group gets a replica."""
    low_busy: float = 0.2
    """Below which one of several would do: what is left must not exceed it."""
    rise_after_s: float = 5.0
    fall_after_s: float = 60.0
    cool_down_s: float = 30.0
    """After a change to a group, before the next one to it. Does not hold where a node leaves."""
    half_life_s: float = 30.0
    """Of the demand that is remembered."""
    least_rows_per_s: float = 0.01
    """Below which nobody asks for a group any more."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_actors <= self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} is not in 0 to max_actors {self.max_actors}")
        if not 0.0 < self.low_busy < self.high_busy:
            raise ValueError(f"low_busy {self.low_busy} is not in 0 to high_busy {self.high_busy}")


@dataclass(frozen=True)
class GroupLoad:
    """A group since the last look."""

    group: str
    rows_per_s: float
    busy: float
    """Seconds that its actors computed together, per second."""
    group_bytes: int
    least_bytes: int
    """Of one expert: less an actor cannot keep."""
    trust: float = 0.5
    """Mean of its experts', in [0, 1]."""


@dataclass(frozen=True)
class LoadSnapshot:
    """The service at a moment."""

    capacity: CapacityState
    groups: tuple[GroupLoad, ...]
    nodes: tuple[NodeLoad, ...]


@dataclass(frozen=True)
class Decision:
    """One change, and why."""

    kind: Kind
    group: str
    actor: str
    """The actor that comes, goes or changes; of a move, the one that goes."""
    reason: str
    node_id: str | None = None
    """Where it goes to. None: nowhere has room, so that it waits for a new machine."""
    budget_bytes: int | None = None
    successor: str = ""
    """Of a move: the actor that comes."""


@dataclass(frozen=True)
class GroupHistory:
    """What is remembered of a group. Times are of a monotonic clock."""

    rows_per_s: float = 0.0
    """Expected demand: a moving average."""
    high_since_s: float | None = None
    low_since_s: float | None = None
    changed_at_s: float = float("-inf")


@dataclass(frozen=True)
class ScalerState:
    """Between two looks."""

    looked_at_s: float | None = None
    groups: Mapping[str, GroupHistory] = field(default_factory=dict)
    num_named: int = 0
    """Actors that were given a name: none is given twice."""


def decide(
    state: ScalerState, snapshot: LoadSnapshot, plan: ServicePlan, settings: ScalerSettings, now_s: float
) -> tuple[ScalerState, tuple[Decision, ...]]:
    """What to change in the plan. now_s: of a monotonic clock, not before the last look's.

    Raises KeyError where the snapshot lacks a group of the plan.
    """
    loads = {load.group: load for load in snapshot.groups}
    counts = {group.name: 0 for group in plan.groups}
    for actor in plan.actors:
        counts[actor.group] += 1
    histories = {name: _remember(state, loads[name], counts[name], settings, now_s) for name in counts}
    order = sorted(counts, key=lambda name: (-histories[name].rows_per_s, -loads[name].trust, name))
    wanted = _wanted(order, counts, histories, snapshot.capacity, settings, now_s)
    look = _Look(plan, loads, snapshot.nodes, state.num_named)
    is_asked = {name: histories[name].rows_per_s >= settings.least_rows_per_s for name in counts}
    look.leave_nodes(wanted)
    for name in reversed(order):
        look.drain_to(
            name, wanted[name], _why_fewer(snapshot.capacity, histories[name], is_asked[name], now_s)
        )
    for name in order:
        idle = [other for other in reversed(order) if not is_asked[other]]
        why = _why_more(loads[name], counts[name])
        look.add_to(name, wanted[name], why, idle)
    for name in order:
        if is_asked[name]:
            look.grow(name)
    changed = {decision.group for decision in look.decisions if decision.kind not in ("shrink", "grow")}
    kept = {
        name: GroupHistory(history.rows_per_s, changed_at_s=now_s) if name in changed else history
        for name, history in histories.items()
    }
    return ScalerState(now_s, kept, look.num_named), tuple(look.decisions)


def carry_out(plan: ServicePlan, decisions: Iterable[Decision]) -> ServicePlan:
    """The plan after the decisions of one `decide` about it."""
    actors = {actor.name: actor for actor in plan.actors}
    for decision in decisions:
        if decision.kind in ("drain", "move"):
            del actors[decision.actor]
        name = decision.successor if decision.kind == "move" else decision.actor
        if decision.kind in ("shrink", "grow"):
            actors[name] = replace(actors[name], budget_bytes=decision.budget_bytes)
        elif decision.kind != "drain":
            actors[name] = ActorPlan(name, decision.group, decision.node_id, decision.budget_bytes)
    return replace(plan, actors=tuple(actors.values()))


def _remember(
    state: ScalerState, load: GroupLoad, num_actors: int, settings: ScalerSettings, now_s: float
) -> GroupHistory:
    before = state.groups.get(load.group)
    if before is None or state.looked_at_s is None:
        before = GroupHistory(load.rows_per_s)
        weight = 1.0
    else:
        weight = 1.0 - 0.5 ** ((now_s - state.looked_at_s) / settings.half_life_s)
    rows_per_s = before.rows_per_s + weight * (load.rows_per_s - before.rows_per_s)
    is_high = num_actors > 0 and load.busy > settings.high_busy * num_actors
    if num_actors > 1:
        is_low = load.busy <= settings.low_busy * (num_actors - 1)
    else:
        is_low = load.rows_per_s < settings.least_rows_per_s
    return GroupHistory(
        rows_per_s,
        _since(before.high_since_s, is_high, now_s),
        _since(before.low_since_s, is_low, now_s),
        before.changed_at_s,
    )


def _since(before_s: float | None, is_so: bool, now_s: float) -> float | None:
    if not is_so:
        return None
    return now_s if before_s is None else before_s


def _wanted(
    order: Sequence[str],
    counts: Mapping[str, int],
    histories: Mapping[str, GroupHistory],
    capacity: CapacityState,
    settings: ScalerSettings,
    now_s: float,
) -> dict[str, int]:
    """How many actors each group should have. order: of the groups, the most wanted first."""
    if capacity == "rest":
        wanted = dict.fromkeys(order, 0)
    else:
        wanted = {name: _group_wants(histories[name], counts[name], settings, now_s) for name in order}
        # The state bounds growth only: what runs goes when it is idle for long.
        asked = max(sum(number > 0 for number in wanted.values()), sum(counts.values()))
        ceiling = max(asked, num_actors_at(capacity, settings.max_actors))
        _cut(wanted, order, min(settings.max_actors, ceiling))
    for name in order:  # the floor: of what runs, the most wanted stays
        missing = settings.min_actors - sum(wanted.values())
        wanted[name] += max(0, min(missing, counts[name] - wanted[name]))
    return wanted


def _group_wants(history: GroupHistory, count: int, settings: ScalerSettings, now_s: float) -> int:
    if count == 0:
        return int(history.rows_per_s >= settings.least_rows_per_s)
    if now_s - history.changed_at_s < settings.cool_down_s:
        return count
    if history.high_since_s is not None and now_s - history.high_since_s >= settings.rise_after_s:
        return count + 1
    if history.low_since_s is not None and now_s - history.low_since_s >= settings.fall_after_s:
        return count - 1
    return count


def _cut(wanted: dict[str, int], order: Sequence[str], ceiling: int) -> None:
    """Take replicas away first, then whole groups, the least wanted first."""
    for least in (1, 0):
        for name in reversed(order):
            excess = sum(wanted.values()) - ceiling
            if excess > 0:
                wanted[name] -= max(0, min(excess, wanted[name] - least))


def _why_more(load: GroupLoad, count: int) -> str:
    if count == 0:
        return f"{load.rows_per_s:.2f} rows/s are asked of it and nobody answers"
    return f"its {count} actors compute {load.busy:.2f} s a second together"


def _why_fewer(capacity: CapacityState, history: GroupHistory, is_asked: bool, now_s: float) -> str:
    if capacity == "rest":
        return "the service is idle (REST)"
    if history.low_since_s is not None:
        what = "fewer would do" if is_asked else "nobody asked for it"
        return f"{what} for {now_s - history.low_since_s:.0f} s"
    return "the most actors that are allowed now are reached"


class _Look:
    """The decisions of one look, and the rooms after each of them."""

    def __init__(
        self, plan: ServicePlan, loads: Mapping[str, GroupLoad], nodes: Iterable[NodeLoad], num_named: int
    ) -> None:
        self.decisions: list[Decision] = []
        self.num_named = num_named
        self._loads = loads
        self._actors = {actor.name: actor for actor in plan.actors}
        self._used = set(self._actors)
        self._rooms = Rooms.of(nodes, plan, {name: load.group_bytes for name, load in loads.items()})

    def leave_nodes(self, wanted: Mapping[str, int]) -> None:
        """Move actors away from nodes that leave, as far as they are still wanted."""
        for actor in list(self._actors.values()):
            others = sum(
                other.group == actor.group and not self._rooms.is_leaving(other.node_id)
                for other in self._actors.values()
            )
            if self._rooms.is_leaving(actor.node_id) and others < wanted[actor.group]:
                del self._actors[actor.name]
                successor = self._placed(actor.group)
                reason = f"node {actor.node_id} leaves"
                self._decide("move", actor, reason, successor)

    def drain_to(self, group: str, number: int, reason: str) -> None:
        """Take actors away until there are `number`: first those that wait or whose node leaves, then those with
        the least room around them."""
        actors = sorted(self._of(group), key=lambda actor: (self._rooms.free(actor.node_id), actor.name))
        for actor in actors[: max(0, len(actors) - number)]:
            del self._actors[actor.name]
            self._rooms.give_back(actor)
            self._decide("drain", actor, reason)

    def add_to(self, group: str, number: int, reason: str, idle: Sequence[str]) -> None:
        """Add actors until there are `number`. idle: groups that give way, those that are wanted least first."""
        while len(self._of(group)) < number:
            kind: Kind = "replicate" if self._of(group) else "spawn"
            self._make_room(group, idle)
            self._decide(kind, self._placed(group), reason)

    def grow(self, group: str) -> None:
        """Give actors that hold less than their group what has become free around them."""
        load = self._loads[group]
        for actor in self._of(group):
            held = self._rooms.taken_by(actor)
            size = min(load.group_bytes, held + self._rooms.free(actor.node_id))
            if actor.budget_bytes is not None and size - held >= load.least_bytes:
                self._resize(actor, size, "grow", "there is room again")

    def _make_room(self, group: str, idle: Sequence[str]) -> None:
        """Shrink idle groups to the disk tier on the best node, as far as a whole group needs it."""
        node_id = self._rooms.best(group)
        for name in idle:
            missing = self._loads[group].group_bytes - self._rooms.free(node_id)
            for actor in self._of(name):
                excess = self._rooms.taken_by(actor) - self._loads[name].least_bytes
                if node_id is not None and actor.node_id == node_id and missing > 0 and excess > 0:
                    size = self._rooms.taken_by(actor) - min(missing, excess)
                    self._resize(actor, size, "shrink", f"nobody asks for it, and {group} needs the room")

    def _resize(self, actor: ActorPlan, budget_bytes: int, kind: Kind, reason: str) -> None:
        self._rooms.give_back(actor)
        resized = replace(actor, budget_bytes=budget_bytes)
        self._actors[actor.name] = resized
        self._rooms.take(resized)
        self._decide(kind, resized, reason)

    def _placed(self, group: str) -> ActorPlan:
        """A new actor: on the node with the most room, with what of its group fits there; on none if that is less
        than an expert."""
        load, node_id = self._loads[group], self._rooms.best(group)
        size = min(load.group_bytes, self._rooms.free(node_id))
        if size < load.least_bytes:
            node_id, size = None, load.group_bytes
        actor = ActorPlan(self._new_name(group), group, node_id, size)
        self._actors[actor.name] = actor
        self._rooms.take(actor)
        return actor

    def _new_name(self, group: str) -> str:
        while True:
            self.num_named += 1
            name = f"{group}-{self.num_named}"
            if name not in self._used:
                return name

    def _of(self, group: str) -> list[ActorPlan]:
        return [actor for actor in self._actors.values() if actor.group == group]

    def _decide(self, kind: Kind, actor: ActorPlan, reason: str, successor: ActorPlan | None = None) -> None:
        goal = successor or actor
        name = successor.name if successor else ""
        self.decisions.append(
            Decision(kind, actor.group, actor.name, reason, goal.node_id, goal.budget_bytes, name)
        )
