"""An expert directory over expert actors: splits a call by owner, asks all of them at once, and joins the rows.

Experts that no actor owns, and those whose actor is lost, are computed by a worker in this process, with the same
bits. Knows sockets and nothing of Ray; who is where comes from a `Roster`. Used by `cluster.ray_directory`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.directory import DirectoryStats
from experts.errors import TransportError
from experts.numerics import quantization_in
from experts.roster import Owners, ResidentExperts, Roster, choose_owner
from experts.transport import Endpoint, ExpertConnection, ServiceInfo, TransportLimits
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """The part of a call that goes to one owner, and where its rows belong in the whole."""

    call: ExpertCall
    rows: tuple[int, ...]


def split_by_owner(call: ExpertCall, owners: Owners, present: frozenset[str]) -> dict[str | None, Share]:
    """Cut a call by owner; None stands for this process. Each share carries only the tokens that it needs."""
    groups: dict[str | None, list[int]] = {}
    for index, expert in enumerate(call.experts):
        key = ExpertKey(call.component, call.layer, expert)
        groups.setdefault(choose_owner(owners.get(key, ()), present), []).append(index)
    if len(groups) == 1:
        name = next(iter(groups))
        return {name: Share(call, tuple(range(call.num_rows)))}
    starts = [0]
    for count in call.counts:
        starts.append(starts[-1] + count)
    return {name: _share(call, indices, starts) for name, indices in groups.items()}


def _share(call: ExpertCall, indices: list[int], starts: list[int]) -> Share:
    rows = [row for index in indices for row in range(starts[index], starts[index + 1])]
    tokens = sorted({call.token_of_R[row] for row in rows})
    place = {token: index for index, token in enumerate(tokens)}
    tokens_TD = call.tokens_TD
    if len(tokens) < tokens_TD.shape[0]:
        tokens_TD = tokens_TD.index_select(0, torch.tensor(tokens, device=tokens_TD.device))
    part = ExpertCall(
        call.component,
        call.layer,
        tuple(call.experts[index] for index in indices),
        tuple(call.counts[index] for index in indices),
        tuple(place[call.token_of_R[row]] for row in rows),
        tokens_TD,
        call.request_id,
    )
    return Share(part, tuple(rows))


class _View(NamedTuple):
    """What a call reads once: every owner that has a connection announced all components that it owns."""

    owners: Owners
    connections: Mapping[str, ExpertConnection]
    resident: Mapping[str, ResidentExperts]


class RemoteDirectory:
    """Long-lived connections to the actors of a roster, tended by a thread of its own. Any thread may call."""

    def __init__(
        self,
        local: ExpertWorker,
        roster: Roster,
        secret: bytes,
        *,
        limits: TransportLimits | None = None,
        call_timeout_s: float = 30.0,
        on_lost: Callable[[str], None] = lambda name: None,
    ) -> None:
        """local: computes what no actor does.

        on_lost: called with an actor's name when its connection failed, maybe more than once, on the thread that
        noticed. It must neither wait nor raise.
        """
        self._local = local
        self._secret = secret
        self._limits = limits or TransportLimits()
        self._call_timeout_s = call_timeout_s
        self._on_lost = on_lost
        self._view = _View({}, {}, {})
        self._roster_version = -1
        self._refused: frozenset[Endpoint] = frozenset()
        """Actors that cannot compute what is wanted of them; not asked again in the same incarnation."""
        self._changes = threading.Lock()
        self._local_rows = self._remote_rows = self._failovers = 0
        self._hop_seconds = 0.0
        self._closing = threading.Event()
        self.update(roster)
        self._tender = threading.Thread(target=self._tend, name="expert-heartbeat", daemon=True)
        self._tender.start()

    @property
    def local(self) -> ExpertWorker:
        return self._local

    def connected(self) -> frozenset[str]:
        """Names of the actors that calls can go to now."""
        return frozenset(name for name, link in self._view.connections.items() if link.is_open)

    def update(self, roster: Roster) -> None:
        """Follow a newer roster: connect to actors that are new or restarted, drop those that are gone.

        An actor that cannot be reached, or does not fit the worker in this process, is left out, and its experts
        are computed here.
        """
        with self._changes:
            if self._closing.is_set() or roster.version < self._roster_version:
                return
            self._roster_version = roster.version
            self._refused = self._refused.intersection(roster.endpoints.values())
            components = _components_by_owner(roster.owners)
            before = self._view.connections
            kept = {
                name: link
                for name, link in before.items()
                if link.is_open
                and roster.endpoints.get(name) == link.endpoint
                and self._is_fit(link.endpoint, link.info, components.get(name, frozenset()))
            }
            self._view = _View(roster.owners, kept, roster.resident)
            for name, link in before.items():
                if name not in kept:
                    link.close()
            for name, endpoint in roster.endpoints.items():
                if name not in kept and endpoint not in self._refused and not self._closing.is_set():
                    self._add(name, endpoint, components.get(name, frozenset()))

    def run(self, call: ExpertCall) -> Tensor:
        """See ExpertDirectory.run."""
        owners, connections, _ = self._view
        present = frozenset(name for name, link in connections.items() if link.is_open)
        shares = split_by_owner(call, owners, present)
        if not shares or list(shares) == [None]:
            return self._run_local(call)
        results: list[tuple[Share, Tensor]] = []
        asked: list[str] = []
        failed: list[str] = []
        try:
            # By name, since a connection is held until its answer: two threads in two orders would wait for ever.
            for name in sorted(name for name in shares if name is not None):
                (asked if self._start(connections[name], shares[name]) else failed).append(name)
            if None in shares:
                results.append((shares[None], self._run_local(shares[None].call)))
            while asked:
                rows = self._finish(connections[asked[0]], shares[asked[0]])
                name = asked.pop(0)
                if rows is None:
                    failed.append(name)
                else:
                    results.append((shares[name], rows))
        finally:
            # Only after an error: an answer that nobody waits for must not be taken for the next call's.
            for name in asked:
                connections[name].close()
        for name in failed:
            self._failovers += 1
            self._report(name, connections[name])
            results.append((shares[name], self._run_local(shares[name].call)))
        return _join(results, call.num_rows)

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        """Does nothing: a hint would take a round trip of its own, about as long as the next call is away."""

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """See ExpertDirectory.resident."""
        owners, connections, resident = self._view
        present = frozenset(name for name, link in connections.items() if link.is_open)
        here = self._local.resident(component, layer)
        if present:
            here = frozenset(
                e for e in here if present.isdisjoint(owners.get(ExpertKey(component, layer, e), ()))
            )
        there = (resident.get(name, {}).get((component, layer), frozenset()) for name in present)
        return here.union(*there)

    def stats(self) -> DirectoryStats:
        return DirectoryStats(self._local_rows, self._remote_rows, self._hop_seconds, self._failovers)

    def close(self) -> None:
        self._closing.set()
        self._tender.join()
        with self._changes:
            connections = self._view.connections
            self._view = _View({}, {}, {})
            for link in connections.values():
                link.close()

    def _add(self, name: str, endpoint: Endpoint, components: frozenset[str]) -> None:
        """Connect to an actor; calls and heartbeats go there from now on."""
        try:
            link = ExpertConnection(endpoint, secret=self._secret, limits=self._limits)
        except TransportError as error:
            logger.warning("cannot reach expert actor %s: %s", endpoint.name, error)
            return
        if not self._is_fit(endpoint, link.info, components):
            link.close()
            return
        if link.info.numerics_class != self._local.numerics_class:
            logger.warning(
                "expert actor %s computes in another numerics class (%s, here %s): results are not bitwise equal",
                endpoint.name,
                link.info.numerics_class,
                self._local.numerics_class,
            )
        view = self._view
        self._view = view._replace(connections={**view.connections, name: link})

    def _is_fit(self, endpoint: Endpoint, info: ServiceInfo, components: frozenset[str]) -> bool:
        """Whether an actor computes the components that it owns as this process does; says so when it does not."""
        widths = self._local._widths
        reasons = [f"has no component {name!r}" for name in sorted(components.difference(info.components))]
        if info.dtype != self._local.dtype:
            reasons.append(f"computes in {info.dtype}, here {self._local.dtype}")
        theirs, ours = (quantization_in(name) for name in (info.numerics_class, self._local.numerics_class))
        if theirs != ours:
            reasons.append(f"has experts in {theirs or 'full precision'}, here in {ours or 'full precision'}")
        for name in info.components:
            if widths.get(name) != info.width:
                reasons.append(f"has component {name!r} of width {info.width}, here {widths.get(name)}")
        if reasons:
            logger.warning(
                "expert actor %s is refused, its experts are computed here: it %s",
                endpoint.name,
                "; ".join(reasons),
            )
            self._refused |= {endpoint}
        return not reasons

    def _run_local(self, call: ExpertCall) -> Tensor:
        self._local_rows += call.num_rows
        return self._local.compute(call)

    def _start(self, link: ExpertConnection, share: Share) -> bool:
        try:
            link.start(share.call, timeout_s=self._call_timeout_s)
        except TransportError as error:
            logger.warning("expert actor %s did not take a call: %s", link.endpoint.name, error)
            return False
        return True

    def _finish(self, link: ExpertConnection, share: Share) -> Tensor | None:
        waiting_since = time.perf_counter()
        try:
            rows = link.finish()
        except TransportError as error:
            logger.warning("expert actor %s did not answer, computing here: %s", link.endpoint.name, error)
            return None
        finally:
            self._hop_seconds += time.perf_counter() - waiting_since
        self._remote_rows += share.call.num_rows
        return rows

    def _tend(self) -> None:
        while not self._closing.wait(self._limits.heartbeat_interval_s):
            for name, link in self._view.connections.items():
                if link.is_open and not link.tend():
                    self._report(name, link)

    def _report(self, name: str, link: ExpertConnection) -> None:
        """Tell of a lost connection, but not of one that still stands or that was closed here on purpose."""
        if not link.is_open and self._view.connections.get(name) is link:
            self._on_lost(name)


def _components_by_owner(owners: Owners) -> dict[str, frozenset[str]]:
    pairs = {(name, key.component) for key, names in owners.items() for name in names}
    return {name: frozenset(component for of, component in pairs if of == name) for name, _ in pairs}


def _join(results: list[tuple[Share, Tensor]], num_rows: int) -> Tensor:
    """Put the shares' rows where they belong in the whole call."""
    if len(results) == 1:
        return results[0][1]
    first = results[0][1]
    joined = first.new_empty(num_rows, first.shape[1])
    for share, rows in results:
        joined.index_copy_(0, torch.tensor(share.rows, device=joined.device), rows)
    return joined
