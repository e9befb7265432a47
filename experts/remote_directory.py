"""An expert directory over expert actors: splits a call by owner, asks all of them at once, and joins the rows.

Experts that no actor owns, and those whose actor is lost, are computed by a worker in this process, with the same
bits. Knows sockets and nothing of Ray; who is where comes from a `Roster`. Used by `cluster.ray_directory`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.directory import DirectoryStats
from experts.errors import TransportError
from experts.transport import Endpoint, ExpertConnection, TransportLimits
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Roster:
    """Which actor owns which expert. `version` grows with every change."""

    version: int
    endpoints: Mapping[str, Endpoint]
    """Actor name -> where it listens. Actors that are down are absent."""
    owner: Mapping[ExpertKey, str]


@dataclass(frozen=True)
class Share:
    """The part of a call that goes to one owner, and where its rows belong in the whole."""

    call: ExpertCall
    rows: tuple[int, ...]


def split_by_owner(
    call: ExpertCall, owner: Mapping[ExpertKey, str], present: frozenset[str]
) -> dict[str | None, Share]:
    """Cut a call by owner; None stands for this process. Each share carries only the tokens that it needs."""
    groups: dict[str | None, list[int]] = {}
    for index, expert in enumerate(call.experts):
        name = owner.get(ExpertKey(call.component, call.layer, expert))
        groups.setdefault(name if name in present else None, []).append(index)
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


class RemoteDirectory:
    """Long-lived connections to the actors of a roster, tended by a thread of its own."""

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
        """local: computes what no actor does. on_lost: called with an actor's name when its connection failed."""
        self._local = local
        self._secret = secret
        self._limits = limits or TransportLimits()
        self._call_timeout_s = call_timeout_s
        self._on_lost = on_lost
        self._connections: dict[str, ExpertConnection] = {}
        self._roster = Roster(-1, {}, {})
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
        return frozenset(name for name, link in list(self._connections.items()) if link.is_open)

    def update(self, roster: Roster) -> None:
        """Follow a newer roster: connect to actors that are new or restarted, drop those that are gone.

        An actor that cannot be reached is left out, and its experts are computed here. Any thread may call.
        """
        with self._changes:
            if roster.version < self._roster.version:
                return
            connections = dict(self._connections)
            for name, link in list(connections.items()):
                if roster.endpoints.get(name) != link.endpoint or not link.is_open:
                    connections.pop(name).close()
            for name, endpoint in roster.endpoints.items():
                if name not in connections and (new := self._connect(endpoint)) is not None:
                    connections[name] = new
            self._roster, self._connections = roster, connections

    def run(self, call: ExpertCall) -> Tensor:
        """See ExpertDirectory.run."""
        connections = self._connections
        present = frozenset(name for name, link in connections.items() if link.is_open)
        shares = split_by_owner(call, self._roster.owner, present)
        if list(shares) == [None]:
            return self._run_local(call)
        asked = {
            name: self._start(connections[name], share) for name, share in shares.items() if name is not None
        }
        results: list[tuple[Share, Tensor]] = []
        try:
            if None in shares:
                results.append((shares[None], self._run_local(shares[None].call)))
            waiting_since = time.perf_counter()
            for name, is_asked in list(asked.items()):
                rows = self._finish(connections[name], shares[name]) if is_asked else None
                del asked[name]
                if rows is None:
                    self._failovers += 1
                    self._on_lost(name)
                    rows = self._run_local(shares[name].call)
                results.append((shares[name], rows))
            self._hop_seconds += time.perf_counter() - waiting_since
        finally:
            # Only after an error: an answer that nobody waits for must not be taken for the next call's.
            for name in asked:
                connections[name].close()
        return _join(results, call.num_rows)

    def stats(self) -> DirectoryStats:
        return DirectoryStats(self._local_rows, self._remote_rows, self._hop_seconds, self._failovers)

    def close(self) -> None:
        self._closing.set()
        self._tender.join()
        with self._changes:
            for link in self._connections.values():
                link.close()
            self._connections = {}

    def _connect(self, endpoint: Endpoint) -> ExpertConnection | None:
        try:
            link = ExpertConnection(endpoint, secret=self._secret, limits=self._limits)
        except TransportError as error:
            logger.warning("cannot reach expert actor %s: %s", endpoint.name, error)
            return None
        if link.info.numerics_class != self._local.numerics_class:
            logger.warning(
                "expert actor %s computes in another numerics class (%s, here %s): results are not bitwise equal",
                endpoint.name,
                link.info.numerics_class,
                self._local.numerics_class,
            )
        return link

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
        try:
            rows = link.finish()
        except TransportError as error:
            logger.warning("expert actor %s did not answer, computing here: %s", link.endpoint.name, error)
            return None
        self._remote_rows += share.call.num_rows
        return rows

    def _tend(self) -> None:
        while not self._closing.wait(self._limits.heartbeat_interval_s):
            for name, link in list(self._connections.items()):
                if link.is_open and not link.tend():
                    self._on_lost(name)


def _join(results: list[tuple[Share, Tensor]], num_rows: int) -> Tensor:
    """Put the shares' rows where they belong in the whole call."""
    if len(results) == 1:
        return results[0][1]
    first = results[0][1]
    joined = first.new_empty(num_rows, first.shape[1])
    for share, rows in results:
        joined.index_copy_(0, torch.tensor(share.rows, device=joined.device), rows)
    return joined
