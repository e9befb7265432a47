"""Expert actors as the supervisor last saw them, and what follows from one look at one of them. Pure.

Used by `cluster.reconcile`, which decides, and by `cluster.supervisor`, which looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from experts.actor_report import ActorIdentity
from experts.roster import Endpoint
from extraction.manifest import ExpertKey

MemberState = Literal[
    "found", "starting", "ready", "draining", "retiring", "lost", "quarantined", "failed", "orphan"
]
"""found: discovered in Ray, has not said yet who it is. starting: created, has not answered yet. ready: answers, and
is given rows. draining: is given no new rows. retiring: routers are to let go of it. lost: died, or is silent.
quarantined: a router says that it computes what is wrong. failed: did not start. orphan: of another service."""


@dataclass(frozen=True)
class Patience:
    """How long what may take. Times in seconds."""

    start_s: float = 300.0
    """From an actor's creation to its first answer."""
    wait_s: float = 3600.0
    """The same where it waits for a machine; then Ray is asked anew."""
    find_s: float = 20.0
    """For an actor that was found to say who it is."""
    silence_s: float = 10.0
    """Without an answer, after which an actor is lost."""
    suspicion_s: float = 4.0
    """The same where a router has lost it, too."""
    look_s: float = 3.0
    """Between two looks: what the supervisor itself takes longer for is nobody's silence."""
    doubt_s: float = 2.0
    """The same, after which its node is asked whether it is there."""
    settle_s: float = 3.0
    """For routers to follow a roster, where none has told of itself."""
    drain_s: float = 60.0
    """For the calls of a draining actor to end."""
    retire_s: float = 10.0
    """For routers to let go of a retiring actor."""
    infancy_s: float = 5.0
    """An actor that is lost so soon after it was ready counts as one that did not start."""


@dataclass(frozen=True)
class Member:
    """One expert actor in Ray. Times are of a monotonic clock, in seconds."""

    name: str
    """In Ray: unique among all that live."""
    state: MemberState
    since_s: float
    """When it came into this state."""
    heard_at_s: float
    """Its last answer, or its creation."""
    actor: str = ""
    """The plan's actor that it stands for; empty while nobody knows."""
    fingerprint: str = ""
    incarnation: int = 0
    node_id: str | None = None
    """Where it runs, or is to run; None while Ray has not told."""
    budget_bytes: int | None = None
    """What it was started with."""
    keys: tuple[ExpertKey, ...] = ()
    endpoint: Endpoint | None = None
    """Where it listens, once it has said so."""
    told_in: int | None = None
    """The first version of the roster that tells of its state; None before there is one."""
    is_waiting_for_node: bool = False
    """Whether no node had room for it when it was created."""
    is_suspected: bool = False
    """Whether a router has lost it since its last answer."""
    is_known: bool = False
    """Whether all routers know of its state."""
    is_idle: bool = False
    """Whether it computed nothing between its last two answers."""
    is_gone: bool = False
    """Whether Ray says that it is dead: nothing is to be ended, and its name is free."""
    error: str = ""
    """Of the last failure."""


def identified(member: Member, identity: ActorIdentity, service: str, now_s: float) -> Member:
    """After an actor said who it is."""
    if identity.service != service:
        return turned(member, "orphan", now_s)
    return replace(
        turned(member, "ready", now_s),
        heard_at_s=now_s,
        actor=identity.actor,
        fingerprint=identity.fingerprint,
        incarnation=identity.incarnation,
        node_id=identity.node_id,
        budget_bytes=identity.budget_bytes,
        keys=identity.keys,
        endpoint=identity.endpoint,
        is_waiting_for_node=False,
    )


def heard(member: Member, is_idle: bool, now_s: float) -> Member:
    """After a sign of life."""
    return replace(member, heard_at_s=now_s, is_suspected=False, is_idle=is_idle)


def died(member: Member, error: str, now_s: float, patience: Patience) -> Member:
    """After Ray said that an actor is dead. One that had just become ready counts as one that did not start."""
    return replace(_lost(member, error, now_s, patience), is_gone=True)


def checked(member: Member, now_s: float, patience: Patience) -> Member:
    """After a look at the clock: lost or failed, where it has been silent for too long."""
    silent_s = now_s - member.heard_at_s
    if member.state == "found":
        return turned(member, "orphan", now_s) if silent_s >= patience.find_s else member
    if member.state == "starting":
        is_late = silent_s >= (patience.wait_s if member.is_waiting_for_node else patience.start_s)
        return replace(turned(member, "failed", now_s), error="no answer in time") if is_late else member
    if member.state not in ("ready", "draining", "retiring"):
        return member
    limit_s = patience.suspicion_s if member.is_suspected else patience.silence_s
    return _lost(member, f"silent for {silent_s:.1f} s", now_s, patience) if silent_s >= limit_s else member


def _lost(member: Member, error: str, now_s: float, patience: Patience) -> Member:
    is_infant = member.state == "ready" and now_s - member.since_s < patience.infancy_s
    state: MemberState = "failed" if member.state == "starting" or is_infant else "lost"
    return replace(turned(member, state, now_s), error=error)


def turned(member: Member, state: MemberState, now_s: float) -> Member:
    return replace(member, state=state, since_s=now_s, told_in=None, is_known=False, is_idle=False)


# Starting again


@dataclass(frozen=True)
class Backoff:
    """Of one of the plan's actors: how often it failed in a row, and when it may be tried again."""

    failures: int
    retry_at_s: float
    error: str = ""


FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
Backoffs = Mapping[str, Backoff]


def failed(backoffs: Backoffs, actor: str, error: str, now_s: float) -> dict[str, Backoff]:
    """After one more failure of an actor: twice the wait of the failure before."""
    failures = backoffs[actor].failures + 1 if actor in backoffs else 1
    wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(failures - 1, 10))
    return {**backoffs, actor: Backoff(failures, now_s + wait_s, error)}


def recovered(
    backoffs: Backoffs, members: Iterable[Member], now_s: float, patience: Patience
) -> dict[str, Backoff]:
    """Forget the failures of actors that have been ready for a while."""
    well = {m.actor for m in members if m.state == "ready" and now_s - m.since_s >= patience.infancy_s}
    return {actor: backoff for actor, backoff in backoffs.items() if actor not in well}
