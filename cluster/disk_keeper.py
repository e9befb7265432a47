"""The Ray shell that asks expert actors what is on their disks, and tells them from whom to fetch and what to keep.

Waits for none of them; one call at a time is open to an actor. Decides nothing: `cluster.disk_desk` does. Used by
`cluster.supervisor`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from cluster.disk_desk import Address, DiskDecision, Keeper, decide_disks, peers_for
from cluster.members import Member
from experts.actor_report import DiskReport
from experts.store_source import StoreSource
from extraction.manifest import ExpertKey

logger = logging.getLogger(__name__)

ASK_INTERVAL_S = 2.0

Members = Mapping[str, tuple[Member, Any]]
"""Ready actors with their handles, by name in Ray."""
Place = tuple[str, tuple[ExpertKey, ...]]
"""A node, and the group of an actor there."""


@dataclass
class _Known:
    """An actor's disk, as far as it has told. incarnation: what is known of another one is nothing."""

    incarnation: int
    asked_at_s: float = float("-inf")
    report: DiskReport | None = None
    peers: tuple[Address, ...] = ()
    """That it was told of."""
    ordered: frozenset[ExpertKey] = frozenset()
    has_refused: bool = False


@dataclass(frozen=True)
class _Call:
    """What is open to an actor, and what it says when it is answered."""

    answer: Any
    incarnation: int
    take: Callable[[_Known, Any], bool]
    """Notes it, and says whether that is news."""
    is_order: bool = False


class DiskKeeper:
    """Used on one thread. Times are of a monotonic clock, in seconds."""

    def __init__(
        self, record_bytes: Mapping[ExpertKey, int], source: StoreSource | None, head: str | None
    ) -> None:
        """record_bytes: of every expert that is served. source: where machines without the store look, peers left out;
        None where all have it. head: see `decide_disks`."""
        self._record_bytes, self._source, self._head = record_bytes, source, head
        self._known: dict[str, _Known] = {}
        self._open: dict[str, _Call] = {}
        self._decided_for: tuple[tuple[str, ...], frozenset[Place]] = ((), frozenset())
        """Names of those that were ready, and those that had not said anything."""
        self._keepers: tuple[Keeper, ...] = ()
        self.decision = DiskDecision()
        """The last one."""

    def source_for(self, keys: Collection[ExpertKey], node: str | None) -> StoreSource | None:
        """Where an actor that is to start there finds the store."""
        if self._source is None:
            return None
        return replace(self._source, peers=peers_for(frozenset(keys), node, self._keepers))

    def look(self, members: Members, starting: Collection[Member], now_s: float) -> None:
        """Take in answers, decide where there is news, and ask or tell whoever has nothing open.

        members: those that are ready. starting: those that are not yet.
        """
        self._known = {
            name: known
            for name, known in self._known.items()
            if name in members and members[name][0].incarnation == known.incarnation
        }
        for name, (member, _) in members.items():
            self._known.setdefault(name, _Known(member.incarnation))
        has_news = self._take_answers()
        silent = [member for name, (member, _) in members.items() if self._known[name].report is None]
        decides_for = (tuple(self._known), frozenset(_places((*starting, *silent))))
        if has_news or self._decided_for != decides_for:
            self._decide(members, decides_for[1])
            self._decided_for = decides_for
        for name, (_, handle) in members.items():
            if name not in self._open:
                self._next(name, handle, now_s)

    def _take_answers(self) -> bool:
        calls = {call.answer: name for name, call in self._open.items()}
        if not calls:
            return False
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0.0)
        has_news = False
        for answer in done:
            name = calls[answer]
            call, known = self._open.pop(name), self._known.get(name)
            if known is None or known.incarnation != call.incarnation:
                continue
            try:
                has_news |= call.take(known, ray.get(answer))
            except ray.exceptions.RayError as error:
                has_news |= call.is_order
                known.has_refused |= call.is_order
                reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                logger.warning("expert actor %s was not asked or told about its disk: %s", name, reason[0])
        return has_news

    def _decide(self, members: Members, coming: Collection[Place]) -> None:
        self._keepers = tuple(
            Keeper(
                name,
                members[name][0].node_id or "",
                frozenset(members[name][0].keys),
                known.report,
                known.ordered,
                not known.has_refused,
            )
            for name, known in sorted(self._known.items())
            if known.report is not None
        )
        groups: dict[str, frozenset[ExpertKey]] = {}
        for node, keys in coming:
            groups[node] = groups.get(node, frozenset()).union(keys)
        decision = decide_disks(self._record_bytes, self._keepers, self._head, groups)
        if decision.fallbacks == self.decision.fallbacks:  # the same object tells others that nothing is new
            decision = replace(decision, fallbacks=self.decision.fallbacks)
        self.decision = decision

    def _next(self, name: str, handle: Any, now_s: float) -> None:
        """What an actor is to be told now; else, after a while, the question how its disk is."""
        known = self._known[name]
        keys, peers = self.decision.holds.get(name, ()), self.decision.peers.get(name, known.peers)
        if self._source is not None and peers != known.peers:
            self._call(name, handle.set_source.remote(replace(self._source, peers=peers)), _told(peers))
        elif not known.ordered.issuperset(keys) and not known.has_refused:
            self._call(name, handle.hold.remote(keys), _ordered(keys), is_order=True)
        elif now_s - known.asked_at_s >= ASK_INTERVAL_S:
            known.asked_at_s = now_s
            self._call(name, handle.disk.remote(), _reported)

    def _call(
        self, name: str, answer: Any, take: Callable[[_Known, Any], bool], *, is_order: bool = False
    ) -> None:
        self._open[name] = _Call(answer, self._known[name].incarnation, take, is_order)


def _places(members: Iterable[Member]) -> Iterator[Place]:
    """Of those that will be somewhere soon, and do not wait for a node to have room."""
    for member in members:
        if member.node_id is not None and not member.is_waiting_for_node:
            yield member.node_id, member.keys


def _reported(known: _Known, report: DiskReport) -> bool:
    """Bytes that are free change all the time, and are no news alone."""
    before, known.report = known.report, report
    return before is None or replace(before, free_bytes=report.free_bytes) != report


def _told(peers: tuple[Address, ...]) -> Callable[[_Known, Any], bool]:
    def take(known: _Known, _: Any) -> bool:
        known.peers = peers
        return False

    return take


def _ordered(keys: tuple[ExpertKey, ...]) -> Callable[[_Known, Any], bool]:
    def take(known: _Known, _: Any) -> bool:
        known.ordered |= frozenset(keys)
        return True

    return take
