"""Which actors come, go, move, shrink and grow, and where: decided from load, demand, trust, capacity and room. Pure.

How many a group should have is `cluster.actor_counts`'s. What nobody asks for gives way: its actor shrinks to the disk
tier where others need the room, and so does a spare; it is drained when it has been idle for long. What fits nowhere
waits for a machine, and takes its place as soon as others give way. `decide` says what
to change and why; `carry_out` makes a plan of it, which `cluster.supervisor` brings about; the simulator drives the
same two functions.

Nothing swings: a load must have been high or low for a while, and a group that was changed is left alone for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.actor_counts import (
    GroupLoad,
    GroupView,
    ScalerSettings,
    ScalerState,
    view_groups,
    wanted_counts,
)
from cluster.capacity import CapacityState
from cluster.plan import ActorPlan, ServicePlan
from cluster.replicas import LEAST_SHARE
from cluster.scaling_room import NodeLoad, Rooms

__all__ = [
    "Decision",
    "GroupLoad",
    "LoadSnapshot",
    "ScalerSettings",
    "ScalerState",
    "carry_out",
    "decide",
]

Kind = Literal["spawn", "replicate", "move", "drain", "shrink", "grow"]


@dataclass(frozen=True)
class LoadSnapshot:
    """The service at a moment."""

    capacity: CapacityState
    groups: tuple[GroupLoad, ...]
    nodes: tuple[NodeLoad, ...]
    can_add_machines: bool = True
    """Whether what no node has room for may wait for a machine; otherwise it is left to the routers."""
    waiting: frozenset[str] = frozenset()
    """Actors that wait for a machine. Of the others without a node Ray chooses it."""


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
    num_nodes = sum(not node.is_leaving for node in snapshot.nodes)
    views = view_groups(state, [loads[name] for name in counts], counts, num_nodes, settings, now_s)
    wanted = wanted_counts(views, snapshot.capacity, settings, now_s)
    look = _Look(plan, views, snapshot)
    look.leave_nodes(wanted)
    for view in reversed(views):
        look.drain_to(view.name, wanted[view.name], _why_fewer(snapshot.capacity, view, now_s))
    for view in views:
        if not view.is_cold:
            look.settle(view.name)
        look.add_to(view, wanted[view.name])
    for view in views:
        if not view.is_cold:
            look.grow(view.name)
    changed = {decision.group for decision in look.decisions if decision.kind not in ("shrink", "grow")}
    histories = {
        view.name: view.history.changed(now_s) if view.name in changed else view.history for view in views
    }
    return ScalerState(now_s, histories), tuple(look.decisions)


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


def _why_more(view: GroupView, is_spare: bool) -> str:
    if is_spare:
        return (
            f"were its only actor lost, answers would wait {view.load.fallback_s:.1f} s for the router's disk"
        )
    if not view.count:
        return f"{view.load.rows_per_s:.2f} rows/s are asked of it and nobody answers"
    return f"its {view.count} actors compute {view.load.busy:.2f} s a second together"


def _why_fewer(capacity: CapacityState, view: GroupView, now_s: float) -> str:
    if capacity == "rest":
        return "the service is idle (REST)"
    since_s = view.history.low_since_s
    if since_s is not None:
        what = "fewer would do" if view.is_asked else "nobody asked for it"
        return f"{what} for {now_s - since_s:.0f} s"
    return "the most actors that are allowed now are reached"


class _Look:
    """The decisions of one look, and the rooms after each of them."""

    def __init__(self, plan: ServicePlan, views: Sequence[GroupView], snapshot: LoadSnapshot) -> None:
        """views: the most wanted first."""
        self.decisions: list[Decision] = []
        self._views = {view.name: view for view in views}
        self._actors = {actor.name: actor for actor in plan.actors}
        self._used = set(self._actors)
        sizes = {view.name: view.load.group_bytes for view in views}
        self._rooms = Rooms.of(snapshot.nodes, plan, sizes)
        self._can_wait, self._waiting = snapshot.can_add_machines, snapshot.waiting
        num_bytes = sum(view.load.group_bytes for view in views if not view.is_cold)
        room = sum(node.room_bytes for node in snapshot.nodes if not node.is_leaving)
        is_short = not self._can_wait and room < num_bytes
        self._share = room / num_bytes if is_short else 1.0
        """Of its bytes that every group that is not cold keeps in memory, where the room is divided evenly: where it is
        short and no machine can come."""

    def leave_nodes(self, wanted: Mapping[str, int]) -> None:
        """Move actors away from nodes that leave, as far as they are still wanted. A spare for which there is no room
        elsewhere goes."""
        for actor in list(self._actors.values()):
            group = actor.group
            others = sum(not self._rooms.is_leaving(other.node_id) for other in self._of(group))
            if not self._rooms.is_leaving(actor.node_id) or others >= wanted[group]:
                continue
            del self._actors[actor.name]
            reason = f"node {(actor.node_id or '')[:12]} leaves"
            can_wait = self._can_wait and not (others and self._views[group].is_spared)
            if not can_wait and not self._has_room(group):
                self._decide("drain", actor, f"{reason}, and no other has room")
            else:
                self._decide("move", actor, reason, self._placed(group))

    def drain_to(self, group: str, number: int, reason: str) -> None:
        """Take actors away until there are `number`: first those that wait or whose node leaves, then those with
        the least room around them."""
        actors = sorted(self._of(group), key=lambda actor: (self._rooms.free(actor.node_id), actor.name))
        for actor in actors[: max(0, len(actors) - number)]:
            del self._actors[actor.name]
            self._rooms.give_back(actor)
            self._decide("drain", actor, reason)

    def add_to(self, view: GroupView, number: int) -> None:
        """Add actors until there are `number`. A spare comes only where there is room for it: no machine is asked for,
        and nobody gives way. Where no machine can come, that holds for every actor but for giving way."""
        while (count := len(self._of(view.name))) < number:
            is_spare = view.is_spared and count > 0
            if not is_spare:
                self._make_room(view.name)
            if (is_spare or not self._can_wait) and not self._has_room(view.name):
                return
            kind: Kind = "replicate" if count else "spawn"
            self._decide(kind, self._placed(view.name), _why_more(view, is_spare))

    def settle(self, group: str) -> None:
        """Bring actors that wait for a machine to one that is there, where what nobody asks for any more gives way."""
        for actor in self._of(group):
            if actor.name not in self._waiting:
                continue
            del self._actors[actor.name]  # while it waits it takes no room and answers for nobody
            self._make_room(group)
            if self._has_room(group):
                self._decide("move", actor, "there is room for what waits", self._placed(group))
            else:
                self._actors[actor.name] = actor

    def grow(self, group: str) -> None:
        """Give actors that hold less than their group what has become free around them."""
        load = self._views[group].load
        for actor in self._of(group):
            held = self._rooms.taken_by(actor)
            size = min(load.group_bytes, held + self._rooms.free(actor.node_id))
            if actor.budget_bytes is not None and size - held >= load.least_bytes:
                self._resize(actor, size, "grow", "there is room again")

    def _make_room(self, group: str) -> None:
        """On the best node: shrink cold groups, then spares, to the disk tier, as far as a whole group needs it; then
        all that have more than an even share, as far as this one has less."""
        node_id = self._rooms.best(group)
        if node_id is None:
            return
        givers = self._givers(node_id) if self._rooms.can_shrink(node_id) else []
        leasts = {giver.name: self._views[giver.group].load.least_bytes for giver, _ in givers}
        excess = sum(max(0, self._rooms.taken_by(giver) - leasts[giver.name]) for giver, _ in givers)
        if self._of(group) and self._rooms.free(node_id) + excess < self._least(group):
            return  # it would not do, and what was given would be taken back
        for giver, why in givers:
            self._take_from(giver, self._views[giver.group].load.least_bytes, group, self._size(group), why)
        if not self._of(group):
            for actor in list(self._actors.values()):
                if actor.node_id == node_id:
                    even = self._even(actor.group)
                    self._take_from(actor, even, group, self._even(group), "it has more than an even share")

    def _take_from(self, giver: ActorPlan, least: int, group: str, wanted: int, why: str) -> None:
        """Shrink an actor, not below `least`, until there are `wanted` bytes free around it."""
        missing = wanted - self._rooms.free(giver.node_id)
        excess = self._rooms.taken_by(giver) - least
        if missing > 0 and excess > 0 and self._rooms.can_shrink(giver.node_id):
            size = self._rooms.taken_by(giver) - min(missing, excess)
            self._resize(giver, size, "shrink", f"{why}, and {group} needs the room")

    def _size(self, group: str) -> int:
        return self._views[group].load.group_bytes

    def _even(self, group: str) -> int:
        """A group's bytes in memory, where the room is divided evenly; never less than an expert."""
        load = self._views[group].load
        return max(load.least_bytes, int(load.group_bytes * self._share))

    def _givers(self, node_id: str) -> list[tuple[ActorPlan, str]]:
        """Actors there whose memory others may have, and why; those that are wanted least first."""
        cold, spares = [], []
        for view in reversed(self._views.values()):
            actors = sorted(self._of(view.name), key=lambda actor: (self._rooms.taken_by(actor), actor.name))
            if view.is_cold:
                cold += [(actor, "nobody asks for it") for actor in actors]
            elif view.is_spared:
                spares += [(actor, "it is a spare") for actor in actors[:-1]]
        return [(actor, why) for actor, why in (*cold, *spares) if actor.node_id == node_id]

    def _has_room(self, group: str) -> bool:
        """On a node that has no actor of the group, for what an actor keeps at least."""
        return self._rooms.free(self._rooms.best(group)) >= self._least(group)

    def _least(self, group: str) -> int:
        """Bytes that a new actor has to find room for: an expert's, where nobody else would answer for the group, and
        a replica's share beside an actor that stays: one with less would slow down what it is to help."""
        load = self._views[group].load
        has_other = any(
            actor.node_id is not None and not self._rooms.is_leaving(actor.node_id)
            for actor in self._of(group)
        )
        return max(load.least_bytes, load.group_bytes // LEAST_SHARE if has_other else 0)

    def _resize(self, actor: ActorPlan, budget_bytes: int, kind: Kind, reason: str) -> None:
        self._rooms.give_back(actor)
        resized = replace(actor, budget_bytes=budget_bytes)
        self._actors[actor.name] = resized
        self._rooms.take(resized)
        self._decide(kind, resized, reason)

    def _placed(self, group: str) -> ActorPlan:
        """A new actor: on the best node, with what of an even share fits there; on none if that is too little."""
        load, node_id = self._views[group].load, self._rooms.best(group)
        even = self._even(group) if self._rooms.can_shrink(node_id) else load.group_bytes
        size = min(even, self._rooms.free(node_id))
        if size < self._least(group):
            node_id, size = None, load.group_bytes
        actor = ActorPlan(self._new_name(group), group, node_id, size)
        self._actors[actor.name] = actor
        self._rooms.take(actor)
        return actor

    def _new_name(self, group: str) -> str:
        """With the lowest number that the plan does not use: labels of metrics stay few."""
        numbers = range(1, len(self._used) + 2)
        name = next(name for number in numbers if (name := f"{group}-{number}") not in self._used)
        self._used.add(name)
        return name

    def _of(self, group: str) -> list[ActorPlan]:
        return [actor for actor in self._actors.values() if actor.group == group]

    def _decide(self, kind: Kind, actor: ActorPlan, reason: str, successor: ActorPlan | None = None) -> None:
        goal = successor or actor
        name = successor.name if successor else ""
        self.decisions.append(
            Decision(kind, actor.group, actor.name, reason, goal.node_id, goal.budget_bytes, name)
        )
