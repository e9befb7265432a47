"""What to do so that what runs becomes what is planned: from the plan and the actors as seen to actions. Pure.

Called by `cluster.supervisor` about once a second, which carries the actions out; nothing is remembered in between but
the members themselves. An actor that is wanted is never ended. One that is not, or no longer as it is, serves until
those that take its experts over are ready and known to all routers; then it is drained, retired and ended. A
replacement therefore lives beside what it replaces, under a name of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.members import Backoff, Member, MemberState, Patience
from cluster.plan import ActorPlan
from experts.roster import Owners
from extraction.manifest import ExpertKey

MAX_REPLACED_AT_ONCE = 1
"""Of actors that serve while their replacement starts: each is a second copy of a group in memory."""


@dataclass(frozen=True)
class WantedActor:
    """One of the plan's actors, and what it is to compute."""

    plan: ActorPlan
    fingerprint: str
    keys: tuple[ExpertKey, ...]

    @property
    def name(self) -> str:
        return self.plan.name


@dataclass(frozen=True)
class Target:
    """What is to run."""

    wanted: tuple[WantedActor, ...]
    least_incarnation: int = 0
    """Older ones are replaced: how a rolling restart is asked for."""
    rooms: Mapping[str, int] = field(default_factory=dict)
    """Nodes that live and may be used -> bytes that experts may take there."""
    is_one_machine: bool = True
    """Whether an actor without a node may run anywhere, without asking for room."""
    cut_off: frozenset[str] = frozenset()
    """Of these nodes, those that do not answer, though Ray has not given them up yet: nothing is started there."""


@dataclass(frozen=True)
class Create:
    """Start an actor."""

    name: str
    wanted: WantedActor
    node_id: str | None
    """None leaves it to Ray."""
    is_waiting_for_node: bool
    """Whether Ray is to be asked for the room, since no node has it: it then shows as a demand, and Ray's own
    autoscaler adds a machine."""
    reason: str


@dataclass(frozen=True)
class Turn:
    """Bring a member into another state."""

    name: str
    state: MemberState
    reason: str


@dataclass(frozen=True)
class End:
    """End an actor's process, and forget it."""

    name: str
    reason: str
    is_failure: bool = False
    """Whether the plan's actor has to wait before it is tried again."""


Action = Create | Turn | End


def reconcile(
    target: Target,
    members: Sequence[Member],
    backoffs: Mapping[str, Backoff],
    taken: Collection[str],
    now_s: float,
    patience: Patience,
) -> tuple[Action, ...]:
    """The next actions, in order. taken: names that Ray still has though they are no members any more."""
    seated = _waiting_with_room(target, members)
    taken = {*taken, *seated}
    members = [member for member in members if member.name not in seated]
    current = {wanted.name: _current(target, wanted, members) for wanted in target.wanted}
    back = _taken_back(target, current, members)
    chosen = {member.name for member in current.values() if member is not None}
    superseded = [m for m in members if m.state in ("ready", "starting") and m.name not in chosen]
    endings = (_ending(m, now_s, patience) for m in members if m.name not in back.values())
    serving = [m for m in superseded if m.state == "ready"]
    drains = [*_drains(target, current, serving), *_card_drains(target, current, members, serving)]
    leaving = {m.name for m in members if m.state in ("draining", "retiring")}.union(d.name for d in drains)
    return (
        *(End(name, "waited for a machine, and a node has room now") for name in sorted(seated)),
        *(action for action in endings if action is not None),
        *(End(m.name, "is not wanted any more") for m in superseded if m.state == "starting"),
        *drains,
        *(Turn(name, "ready", "is wanted again") for name in back.values()),
        *_creations(
            target,
            current,
            back,
            members,
            superseded,
            leaving.difference(back.values()),
            backoffs,
            taken,
            now_s,
        ),
    )


def _taken_back(
    target: Target, current: Mapping[str, Member | None], members: Sequence[Member]
) -> dict[str, str]:
    """Of the plan's actors that nobody is, those that an actor could be which is just being drained -> its name."""
    absent = [wanted for wanted in target.wanted if current[wanted.name] is None]
    leaving = {wanted.name: _fitting(target, wanted, members, ("draining",)) for wanted in absent}
    return {name: member.name for name, member in leaving.items() if member is not None}


def _waiting_with_room(target: Target, members: Sequence[Member]) -> set[str]:
    """Members that wait for a machine though by now a node has room for what they are to be."""
    waiting = {m.actor: m.name for m in members if m.state == "starting" and m.is_waiting_for_node}
    rooms = _free_rooms(target, members)
    wanted = (w for w in target.wanted if w.name in waiting and w.plan.node_id not in target.rooms)
    return {waiting[w.name] for w in wanted if not _choose_node(target, w, rooms)[1]}


def fits(target: Target, wanted: WantedActor, member: Member) -> bool:
    """Whether a member is what the plan wants of that actor. One that could answer for more experts is."""
    return (
        member.actor == wanted.name
        and member.fingerprint == wanted.fingerprint
        and _has_keys(member, wanted.keys)
        and member.incarnation >= target.least_incarnation
        and _has_budget(member, wanted.plan.budget_bytes)
        and _is_in_place(target, wanted, member)
    )


def _has_keys(member: Member, keys: tuple[ExpertKey, ...]) -> bool:
    return member.keys == keys or frozenset(member.keys).issuperset(keys)


def _has_budget(member: Member, budget_bytes: int | None) -> bool:
    """An actor can be told to keep less than it was started with, and not more."""
    if member.budget_bytes is None or budget_bytes is None:
        return member.budget_bytes == budget_bytes
    return budget_bytes <= member.budget_bytes


def _is_in_place(target: Target, wanted: WantedActor, member: Member) -> bool:
    if wanted.plan.node_id in target.rooms and wanted.plan.node_id not in target.cut_off:
        return member.node_id == wanted.plan.node_id
    # Its node is gone or cut off, or it never had one: it may stay wherever it has found room.
    return member.is_waiting_for_node or target.is_one_machine or member.node_id in target.rooms


def _current(target: Target, wanted: WantedActor, members: Iterable[Member]) -> Member | None:
    """The member that stands for one of the plan's actors."""
    return _fitting(target, wanted, members, ("ready", "starting"))


def _fitting(
    target: Target, wanted: WantedActor, members: Iterable[Member], states: tuple[MemberState, ...]
) -> Member | None:
    """Of several one that is ready, of these the newest. None that is starting where nothing can be heard of it."""
    fitting = [
        m
        for m in members
        if m.state in states
        and fits(target, wanted, m)
        and not (m.state == "starting" and m.node_id in target.cut_off)
    ]
    return max(fitting, key=lambda m: (m.state == "ready", m.incarnation, m.name), default=None)


def _ending(member: Member, now_s: float, patience: Patience) -> Action | None:
    """What a member's own state leads to, whatever is planned."""
    age_s = now_s - member.since_s
    match member.state:
        case "orphan":
            return End(member.name, "is none of this service's actors")
        case "lost":
            return End(member.name, f"was lost: {member.error}")
        case "failed":
            return End(member.name, f"failed: {member.error}", is_failure=True)
        case "quarantined":
            return End(member.name, f"is quarantined: {member.error}")
        case "draining" if (member.is_known and member.is_idle) or age_s >= patience.drain_s:
            return Turn(member.name, "retiring", "it has finished what it had")
        case "retiring" if member.is_known or age_s >= patience.retire_s:
            return End(member.name, "is retired")
        case _:
            return None


def _drains(
    target: Target, current: Mapping[str, Member | None], superseded: Sequence[Member]
) -> list[Action]:
    """Those whose experts others answer for by now, as all routers know."""
    if not superseded:
        return []
    planned = {key for wanted in target.wanted for key in wanted.keys}
    members = ((wanted, current[wanted.name]) for wanted in target.wanted)
    standing = [w.keys for w, m in members if m is not None and m.state == "ready" and m.is_known]
    missing = planned.difference(*standing)
    return [
        Turn(m.name, "draining", "others have taken over" if planned else "no actor is wanted")
        for m in superseded
        if missing.isdisjoint(m.keys)
    ]


def _card_drains(
    target: Target,
    current: Mapping[str, Member | None],
    members: Sequence[Member],
    superseded: Sequence[Member],
) -> list[Action]:
    """Those that have a card's share which their replacement is to have: a card has no room for two. One at a time;
    meanwhile replicas or routers compute."""
    on_cards = {wanted.name for wanted in target.wanted if wanted.plan.num_gpus}
    waiting = {m.name: m.actor for m in superseded if m.actor in on_cards and current[m.actor] is None}
    is_changing = any(
        m.actor in on_cards and m.state in ("draining", "retiring", "starting") for m in members
    )
    is_lacking = any(current[name] is None and name not in waiting.values() for name in on_cards)
    if is_changing or is_lacking:
        return []
    return [Turn(name, "draining", "its replacement needs its card") for name in sorted(waiting)[:1]]


def _creations(
    target: Target,
    current: Mapping[str, Member | None],
    back: Collection[str],
    members: Sequence[Member],
    superseded: Sequence[Member],
    leaving: Collection[str],
    backoffs: Mapping[str, Backoff],
    taken: Collection[str],
    now_s: float,
) -> list[Action]:
    """leaving: names of members that go within a time; whoever needs their room waits for that."""
    if any(member.state == "found" for member in members):
        return []  # one of them may be what is wanted
    serving = {member.actor for member in superseded if member.state == "ready"}
    alive = {member.actor for member in members if not member.is_gone}
    starting = [m.actor for m in current.values() if m is not None and m.state == "starting"]
    num_replaced = sum(actor in serving for actor in starting)
    num_replaced += sum(member.state in ("draining", "retiring") for member in members)
    used = {*taken, *(member.name for member in members if not member.is_gone)}
    rooms = _free_rooms(target, members)
    emptied = {m.node_id for m in members if m.name in leaving and m.budget_bytes and m.node_id in rooms}
    creations: list[Action] = []
    for wanted in target.wanted:
        backoff = backoffs.get(wanted.name)
        if current[wanted.name] is not None or wanted.name in back:
            continue
        if wanted.plan.num_gpus and wanted.name in alive:
            continue  # it has the card, until it has finished
        if backoff is not None and now_s < backoff.retry_at_s:
            continue
        if wanted.name in serving and num_replaced >= MAX_REPLACED_AT_ONCE:
            continue
        node_id, is_waiting = _choose_node(target, wanted, rooms)
        if is_waiting and emptied:
            continue
        if node_id in emptied and rooms[node_id] < 0:
            rooms[node_id] += wanted.plan.budget_bytes or 0
            continue
        num_replaced += wanted.name in serving
        name = _free_name(wanted.name, used)
        used.add(name)
        reason = "replaces what serves" if wanted.name in serving else "nothing answers for it"
        creations.append(Create(name, wanted, node_id, is_waiting, reason))
    return creations


def _free_rooms(target: Target, members: Iterable[Member]) -> dict[str, int]:
    rooms = {node: room for node, room in target.rooms.items() if node not in target.cut_off}
    for member in members:
        if member.node_id in rooms and not member.is_gone:
            rooms[member.node_id] -= member.budget_bytes or 0
    return rooms


def _choose_node(target: Target, wanted: WantedActor, rooms: dict[str, int]) -> tuple[str | None, bool]:
    """Where to start an actor, and whether it waits for a machine: on the plan's node; without one, or where it is
    gone, on the node with the most room, if that is enough. Takes the room."""
    node_id, budget_bytes = wanted.plan.node_id, wanted.plan.budget_bytes or 0
    if node_id not in rooms:
        if target.is_one_machine:
            return None, False
        node_id = min(rooms, key=lambda node: (-rooms[node], node), default=None)
        if node_id is None or rooms[node_id] < budget_bytes:
            return None, True
    assert node_id is not None
    rooms[node_id] -= budget_bytes
    return node_id, False


def _free_name(actor: str, used: Collection[str]) -> str:
    """The plan's name, or that with the lowest number that is free: names, and labels of metrics, stay few."""
    if actor not in used:
        return actor
    return next(name for number in range(2, len(used) + 3) if (name := f"{actor}.{number}") not in used)


def reservation(create: Create, memory: Mapping[str, int], members: Iterable[Member]) -> int:
    """Bytes that Ray is to count for an actor. memory: what Ray counts in all, by node.

    On a node of the plan's choice never more than Ray has left there: the plan knows better what fits. One that waits
    for a machine asks for all it needs.
    """
    budget_bytes = create.wanted.plan.budget_bytes or 0
    if create.node_id is None:
        return budget_bytes
    counted = sum(m.budget_bytes or 0 for m in members if m.node_id == create.node_id and not m.is_gone)
    return min(budget_bytes, max(0, memory.get(create.node_id, 0) - counted))


# Who is where


def make_owners(target: Target, members: Sequence[Member]) -> Owners:
    """Expert -> names of the actors that answer for it: the plan's, in its order, then those that still serve until
    these have taken over. What a group has given away stays with its actors until then. Draining ones are left out."""
    ready = [member for member in members if member.state == "ready"]
    current = [(wanted, _current(target, wanted, ready)) for wanted in target.wanted]
    first = [(member, wanted.keys) for wanted, member in current if member is not None]
    names = {member.name for member, _ in first}
    owners: dict[ExpertKey, tuple[str, ...]] = {}
    for member, keys in (*first, *((member, member.keys) for member in ready if member.name not in names)):
        for key in keys:
            owners[key] = (*owners.get(key, ()), member.name)
    return owners | _given_away(target, first, owners)


def _given_away(
    target: Target, first: Sequence[tuple[Member, tuple[ExpertKey, ...]]], owners: Owners
) -> dict[ExpertKey, tuple[str, ...]]:
    """Of the plan's experts that nobody owns yet, those that an actor could answer for whose group they were in."""
    wider = [member for member, keys in first if len(member.keys) > len(keys)]
    if not wider:
        return {}
    absent = {key for wanted in target.wanted for key in wanted.keys if key not in owners}
    given: dict[ExpertKey, tuple[str, ...]] = {}
    for member in wider:
        for key in absent.intersection(member.keys):
            given[key] = (*given.get(key, ()), member.name)
    return given


def with_fallbacks(target: Target, owners: Owners, fallbacks: Owners, present: Collection[str]) -> Owners:
    """Owners, where an expert of the plan's actors whose own are all gone belongs to who has it on disk: routers would
    otherwise take it for their own. fallbacks: see `Roster.fallbacks`. present: actors that may be asked."""
    lost = {key for wanted in target.wanted for key in wanted.keys if key not in owners and key in fallbacks}
    able = {key: tuple(name for name in fallbacks[key] if name in present) for key in lost}
    return {**owners, **{key: names for key, names in able.items() if names}}


def missing_actor(target: Target, members: Iterable[Member]) -> str | None:
    """One of the plan's actors that nobody is yet; None where all are there."""
    ready = [member for member in members if member.state == "ready"]
    absent = (wanted.name for wanted in target.wanted if _current(target, wanted, ready) is None)
    return next(absent, None)


def is_settled(target: Target, members: Sequence[Member]) -> bool:
    """Whether what runs is what is planned, and nothing else."""
    return missing_actor(target, members) is None and len(members) == len(target.wanted)
