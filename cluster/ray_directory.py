"""The Ray shell of a remote directory: fetches secret and roster from the supervisor and follows changes."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, TypeVar

import ray
from torch import Tensor

from cluster.router_book import RouterLoad
from cluster.supervisor_handle import find_supervisor
from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.directory import DirectoryStats
from experts.exchange import Exchange
from experts.expert_table import ExpertTable
from experts.remote_directory import DirectoryOptions, RemoteDirectory
from experts.roster import ResidentExperts, Roster
from experts.worker import ExpertWorker

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
ANSWER_TIMEOUT_S = 10.0
BEGIN_TIMEOUT_S, BEGIN_INTERVAL_S = 120.0, 0.05
"""For a supervisor that has only been asked for, as routers and actors start side by side, or is being restarted."""

Answer = TypeVar("Answer")


class RayDirectory:
    """An `ExpertDirectory` over the expert actors of this Ray cluster: to be asked after `begin`."""

    def __init__(self, local: ExpertWorker, audit_share: float = 0.0) -> None:
        """local: computes what no actor does. audit_share: see `DirectoryOptions`. Raises SupervisorMissing
        or RayError."""
        self._supervisor = find_supervisor()
        supervisor = self._supervisor
        _is_begun(supervisor)  # that it answers at all, which the others wait for less patiently
        questions = supervisor.secret, supervisor.spin_s, supervisor.roster
        secret, spin_s, roster = _patiently(
            lambda: ray.get([question.remote() for question in questions], timeout=ANSWER_TIMEOUT_S)
        )
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._lost: set[str] = set()
        self._name = uuid.uuid4().hex
        self._roster: Roster = roster
        """That was carried out last."""
        self._share: Fraction | None = None
        self._load: Callable[[], RouterLoad] | None = None
        self._bad: deque[tuple[str, int, str]] = deque()
        self.remote = RemoteDirectory(
            local,
            roster,
            secret,
            limits=TransportLimits(spin_s=spin_s),
            # A seed that nobody can know: which answers are audited must not be foreseen.
            options=DirectoryOptions(audit_share=audit_share, audit_seed=secrets.randbits(64)),
            on_lost=self._report_lost,
            on_bad=self._report_bad,
        )
        self._follower = threading.Thread(target=self._follow, name="roster", daemon=True)

    def begin(self) -> None:
        """Follow the roster from now on. Returns when the service's actors have been there once, and are known here:
        before, this process would read experts that are theirs. Raises RayError."""
        while not _is_begun(self._supervisor):
            time.sleep(BEGIN_INTERVAL_S)
        while _patiently(self._follow_roster):
            pass
        self._follower.start()

    @property
    def num_quarantined(self) -> int:
        """See ExpertDirectory.num_quarantined."""
        return self.remote.num_quarantined

    @property
    def foreign_rows(self) -> int:
        """See ExpertDirectory.foreign_rows."""
        return self.remote.foreign_rows

    def run(self, call: ExpertCall) -> Tensor:
        """See ExpertDirectory.run."""
        return self.remote.run(call)

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        """See RemoteDirectory.prefetch."""
        self.remote.prefetch(component, layer, experts)

    def table(self, component: str, layer: int) -> ExpertTable | None:
        """See RemoteDirectory.table."""
        return self.remote.table(component, layer)

    def exchange(self, component: str, layers: tuple[int, ...], num_experts: int) -> Exchange | None:
        """See RemoteDirectory.exchange."""
        return self.remote.exchange(component, layers, num_experts)

    def note_use(self, table: ExpertTable, used: Sequence[int], num_rows: int) -> None:
        """See RemoteDirectory.note_use."""
        self.remote.note_use(table, used, num_rows)

    def load_more(self) -> bool:
        """See RemoteDirectory.load_more."""
        return self.remote.load_more()

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """See ExpertDirectory.resident."""
        return self.remote.resident(component, layer)

    def stats(self) -> DirectoryStats:
        return self.remote.stats()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        if self._follower.ident is not None:
            self._follower.join()
        self.remote.close()

    def status(self) -> dict[str, Any]:
        """What the supervisor tells; see `Supervisor.status`. Raises RayError when it does not answer."""
        told: dict[str, Any] = ray.get(self._supervisor.status.remote(), timeout=ANSWER_TIMEOUT_S)
        return told

    def report_load(self, source: Callable[[], RouterLoad]) -> None:
        """Tell the supervisor of this router's load from now on, about once a second. source: must not block; called
        on a thread of this directory."""
        self._load = source

    def set_share(self, share: Fraction) -> None:
        """How much of its group every actor is to keep in memory for this router. Does not wait."""
        self._share = share
        self._wake.set()

    def _report_lost(self, name: str) -> None:
        """Called on the engine's or the heartbeat thread: leave the work to the follower."""
        self._lost.add(name)
        self._wake.set()

    def _report_bad(self, name: str, incarnation: int, reason: str) -> None:
        """Called on the engine's or the auditor's thread."""
        self._bad.append((name, incarnation, reason))
        self._wake.set()

    def _follow(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(POLL_INTERVAL_S)
            self._wake.clear()
            if self._closing.is_set():
                return
            try:
                while self._lost:
                    self._supervisor.report_lost.remote(self._lost.pop())
                self._report_all_bad()
                if self._load is not None:
                    self._supervisor.report_load.remote(self._name, self._load())
                while self._follow_roster():
                    pass
            except (ray.exceptions.RayError, TimeoutError) as error:
                logger.warning("the supervisor does not answer: %s", error)
            except Exception:  # nobody else would ever follow the roster again
                logger.exception("the roster was not followed")

    def _report_all_bad(self) -> None:
        """Until the supervisor has taken it in: one that is being restarted will know the actor only later."""
        while self._bad:
            answer = self._supervisor.report_bad.remote(*self._bad[0])
            if not ray.get(answer, timeout=ANSWER_TIMEOUT_S):
                return
            self._bad.popleft()

    def _follow_roster(self) -> bool:
        """Whether the roster has changed, which the supervisor is then to be told at once."""
        answer = self._supervisor.roster.remote(self._name, self._roster.version, self._share)
        told: Roster | Mapping[str, ResidentExperts] = ray.get(answer, timeout=ANSWER_TIMEOUT_S)
        roster = told if isinstance(told, Roster) else replace(self._roster, resident=told)
        self.remote.update(roster)
        is_newer = roster.version > self._roster.version
        if roster.version >= self._roster.version:
            self._roster = roster
        return is_newer and not self._closing.is_set()


def _is_begun(supervisor: Any) -> bool:
    """See `Supervisor.is_begun`. Raises RayError where nobody answers for so long."""
    return _patiently(lambda: bool(ray.get(supervisor.is_begun.remote(), timeout=BEGIN_TIMEOUT_S)))


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """The supervisor's answer, also where it dies meanwhile: Ray restarts it. Raises RayError where it does not."""
    give_up_at = time.monotonic() + BEGIN_TIMEOUT_S
    while True:
        try:
            return ask()
        except ray.exceptions.RayActorError:
            if time.monotonic() > give_up_at:
                raise
        time.sleep(BEGIN_INTERVAL_S)
