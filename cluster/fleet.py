"""The expert actors of a service, and the roster that routers follow: what was seen, decided and done about them.

Carries out what `cluster.reconcile` decides. Knows Ray only through a pool of handles (`cluster.actor_pool`). Not safe
for several threads; used by `cluster.supervisor` under its lock.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

from cluster.members import (
    Backoff,
    Member,
    Patience,
    checked,
    died,
    failed,
    heard,
    identified,
    recovered,
    turned,
)
from cluster.plan import ActorPlan, ServicePlan
from cluster.reconcile import (
    Action,
    Create,
    End,
    Target,
    Turn,
    make_owners,
    reconcile,
    reservation,
    with_fallbacks,
)
from cluster.router_book import RouterBook
from cluster.service_spec import ServiceSpec, actor_spec, service_of
from experts.actor import ActorSpec
from experts.actor_report import ActorIdentity, ActorPulse, Answer, Death
from experts.roster import Owners, Roster
from experts.store_source import StoreSource
from extraction.manifest import ExpertKey

logger = logging.getLogger(__name__)

MAX_NOTES = 200
"""That are remembered for people."""
MAX_REASON_CHARS = 300
SHOWN_ID_CHARS = 12
"""Of a node's id in Ray, as in all tables."""

SourceFor = Callable[[Collection[ExpertKey], str | None], StoreSource | None]
"""For an actor of these experts on that node."""

Note = tuple[float, str, str, str]
"""Unix time, what was done, to whom, and why."""


class Pool(Protocol):
    """Starts and ends actors by their names in Ray."""

    def names_in_use(self) -> Collection[str]:
        """Of actors that were ended and whose names are not free yet."""
        ...

    def create(self, spec: ActorSpec, plan: ActorPlan, node_id: str | None, memory_bytes: int) -> str:
        """Returns why it could not be started; empty where it was."""
        ...

    def end(self, name: str, is_dead: bool) -> None: ...


class Fleet:
    """Times are of a monotonic clock, in seconds."""

    def __init__(self, spec: ServiceSpec, pool: Pool, patience: Patience | None = None) -> None:
        self._spec, self._pool = spec, pool
        self._service = service_of(spec)
        self._patience = patience or Patience()
        self.members: dict[str, Member] = {}
        self.pulses: dict[str, ActorPulse] = {}
        self.backoffs: dict[str, Backoff] = {}
        self.routers = RouterBook()
        self.roster = Roster(int(time.time() * 1000), {}, {})
        self.fallbacks: Owners = {}
        """Who can compute what is lost; see `Roster.fallbacks`. Replaced as a whole where it changes."""
        self.source_for: SourceFor | None = None
        """Where an actor's machine finds the store; None leaves it at the spec's."""
        self.is_starting = False
        """Whether the service has not had all its actors yet."""
        self.notes: deque[Note] = deque(maxlen=MAX_NOTES)
        self._told_of: tuple[object, ...] = ()
        self._incarnation = 0
        self._observed_at_s: float | None = None

    @property
    def is_changing(self) -> bool:
        return any(member.state != "ready" or not member.is_known for member in self.members.values())

    @property
    def is_acquainted(self) -> bool:
        """Whether everybody who was found has said who it is."""
        return self._observed_at_s is not None and all(m.state != "found" for m in self.members.values())

    def next_incarnation(self) -> int:
        """Above that of every actor of this service, also of those that an earlier supervisor has started."""
        self._incarnation = max(self._incarnation + 1, int(time.time()))
        return self._incarnation

    def doubtful_nodes(self, answers: Mapping[str, Answer], now_s: float) -> frozenset[str]:
        """Nodes of which an actor has just died, or has not answered for some time: they may be cut off or gone."""
        return frozenset(
            member.node_id
            for name, member in self.members.items()
            if member.node_id is not None
            and (isinstance(answers.get(name), Death) or now_s - member.heard_at_s > self._patience.doubt_s)
        )

    def note(self, kind: str, name: str, reason: str) -> None:
        """For people."""
        logger.info("%s %s: %s", kind, name, reason)
        self.notes.append((time.time(), kind, name, reason[:MAX_REASON_CHARS]))

    def suspect(self, name: str) -> None:
        """A router has lost its connection to an actor."""
        if name in self.members:
            self.members[name] = replace(self.members[name], is_suspected=True)

    def quarantine(self, name: str, incarnation: int, reason: str, now_s: float) -> Member | None:
        """An actor has computed what is wrong. Returns it; None where it is not there any more, or known already."""
        member = self.members.get(name)
        if member is None or member.incarnation != incarnation or member.state in ("quarantined", "retiring"):
            return None
        self.members[name] = replace(turned(member, "quarantined", now_s), error=reason[:MAX_REASON_CHARS])
        self.note("quarantine", name, reason)
        return member

    def observe(self, found: Collection[str], answers: Mapping[str, Answer], now_s: float) -> None:
        """Take in a look. found: names of actors in Ray that were unknown here."""
        self._excuse(now_s)
        for name in found:
            self.members[name] = Member(name, "found", now_s, now_s)
        for name, answer in answers.items():
            if name in self.members:
                self.members[name] = self._answered(self.members[name], answer, now_s)
        for name, member in self.members.items():
            is_known = self._is_known(member, now_s)
            self.members[name] = replace(checked(member, now_s, self._patience), is_known=is_known)
        self.backoffs = recovered(self.backoffs, self.members.values(), now_s, self._patience)

    def _excuse(self, now_s: float) -> None:
        """Whoever could not be heard since this process was held up, as by a stopped machine, was not silent."""
        before_s, self._observed_at_s = self._observed_at_s, now_s
        held_up_s = 0.0 if before_s is None else now_s - before_s - self._patience.look_s
        if held_up_s > 0:
            for name, member in self.members.items():
                self.members[name] = replace(member, heard_at_s=member.heard_at_s + held_up_s)
            self.routers.excuse(held_up_s, now_s)

    def _answered(self, member: Member, answer: Answer, now_s: float) -> Member:
        if isinstance(answer, Death):
            return died(member, answer.error, now_s, self._patience)
        if isinstance(answer, ActorIdentity):
            member = identified(member, answer, self._service, now_s)
            self._incarnation = max(self._incarnation, member.incarnation)
            node = (member.node_id or "")[:SHOWN_ID_CHARS]
            self.note(member.state, member.name, f"incarnation {member.incarnation} on node {node}")
            return member
        before = self.pulses.get(member.name)
        self.pulses[member.name] = answer
        is_idle = before is not None and before.rows == answer.rows and not answer.num_active
        return heard(member, is_idle, now_s)

    def _is_known(self, member: Member, now_s: float) -> bool:
        if member.told_in is None:
            return False
        follow = self.routers.all_follow(member.told_in, now_s)
        return now_s - member.since_s >= self._patience.settle_s if follow is None else follow

    def act(self, target: Target, plan: ServicePlan, memory: Mapping[str, int], now_s: float) -> None:
        """Do what brings the plan about, and tell routers. memory: what Ray counts in all, by node."""
        members, taken = tuple(self.members.values()), self._pool.names_in_use()
        for action in reconcile(target, members, self.backoffs, taken, now_s, self._patience):
            self._carry_out(action, plan, memory, now_s)
        self._publish(target)

    def _carry_out(self, action: Action, plan: ServicePlan, memory: Mapping[str, int], now_s: float) -> None:
        match action:
            case Create():
                self._create(action, plan, memory, now_s)
            case Turn():
                self.members[action.name] = turned(self.members[action.name], action.state, now_s)
                self.note(action.state, action.name, action.reason)
            case End():
                member = self.members.pop(action.name)
                self.pulses.pop(action.name, None)
                self._pool.end(action.name, member.is_gone)
                if action.is_failure:
                    self.backoffs = failed(self.backoffs, member.actor, member.error, now_s)
                self.note("end", action.name, action.reason)

    def _create(self, action: Create, plan: ServicePlan, memory: Mapping[str, int], now_s: float) -> None:
        actor = action.wanted.plan
        spec = actor_spec(self._spec, plan, actor, action.name, self.next_incarnation())
        spec = replace(spec, is_first=self.is_starting)
        if self.source_for is not None:
            spec = replace(spec, store_source=self.source_for(spec.group, action.node_id))
        is_counted = not self._spec.is_one_machine
        memory_bytes = reservation(action, memory, self.members.values()) if is_counted else 0
        self.note("create", action.name, action.reason)
        error = self._pool.create(spec, actor, action.node_id, memory_bytes)
        if error:
            self.backoffs = failed(self.backoffs, actor.name, error, now_s)
            return
        self.members[action.name] = Member(
            action.name,
            "starting",
            now_s,
            now_s,
            actor.name,
            action.wanted.fingerprint,
            spec.incarnation,
            action.node_id,
            actor.budget_bytes,
            action.wanted.keys,
            is_waiting_for_node=action.is_waiting_for_node,
        )

    def _publish(self, target: Target) -> None:
        """Make a new roster where it differs from the last one."""
        members = tuple(self.members.values())
        told_of = (target, self.fallbacks, *((m.name, m.state, m.incarnation) for m in members))
        if told_of != self._told_of:
            self._told_of = told_of
            endpoints = {
                m.name: m.endpoint for m in members if m.endpoint and m.state in ("ready", "draining")
            }
            owners = with_fallbacks(target, make_owners(target, members), self.fallbacks, endpoints)
            roster = self.roster
            if (endpoints, owners, self.fallbacks) != (roster.endpoints, roster.owners, roster.fallbacks):
                version = max(roster.version, self.routers.highest_version()) + 1
                self.roster = Roster(version, endpoints, owners, fallbacks=self.fallbacks)
        for member in members:
            if member.told_in is None:
                self.members[member.name] = replace(member, told_in=self.roster.version)
