"""The Ray shell of a remote directory: fetches secret and roster from the supervisor and follows changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import ray
from torch import Tensor

from cluster.supervisor import find_supervisor
from experts.call import ExpertCall
from experts.directory import DirectoryStats
from experts.remote_directory import RemoteDirectory
from experts.transport import TransportLimits
from experts.worker import ExpertWorker

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
ANSWER_TIMEOUT_S = 10.0


class RayDirectory:
    """An `ExpertDirectory` over the expert actors of this Ray cluster."""

    def __init__(self, local: ExpertWorker) -> None:
        """local: computes what no actor does. Raises SupervisorMissing."""
        self._supervisor = find_supervisor()
        supervisor = self._supervisor
        asked = [supervisor.secret.remote(), supervisor.spin_s.remote(), supervisor.roster.remote()]
        secret, spin_s, roster = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._lost: set[str] = set()
        self.remote = RemoteDirectory(
            local, roster, secret, limits=TransportLimits(spin_s=spin_s), on_lost=self._report_lost
        )
        self._follower = threading.Thread(target=self._follow, name="roster", daemon=True)
        self._follower.start()

    def run(self, call: ExpertCall) -> Tensor:
        """See ExpertDirectory.run."""
        return self.remote.run(call)

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        """See RemoteDirectory.prefetch."""
        self.remote.prefetch(component, layer, experts)

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """See ExpertDirectory.resident."""
        return self.remote.resident(component, layer)

    def stats(self) -> DirectoryStats:
        return self.remote.stats()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._follower.join()
        self.remote.close()

    def actors(self) -> list[dict[str, Any]]:
        """What the supervisor knows of every actor. Raises RayError when it does not answer."""
        entries: list[dict[str, Any]] = ray.get(self._supervisor.status.remote(), timeout=ANSWER_TIMEOUT_S)
        return entries

    def set_share(self, router: str, share: Fraction) -> None:
        """How much of its group every actor keeps in memory for this router; see `Supervisor.set_share`. Does not
        wait."""
        self._supervisor.set_share.remote(router, share)

    def _report_lost(self, name: str) -> None:
        """Called on the engine's or the heartbeat thread: leave the work to the follower."""
        self._lost.add(name)
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
                self.remote.update(ray.get(self._supervisor.roster.remote(), timeout=ANSWER_TIMEOUT_S))
            except (ray.exceptions.RayError, TimeoutError) as error:
                logger.warning("the supervisor does not answer: %s", error)
