"""Where a router finds experts: the protocol it knows, and the implementation without any actor.

The implementation over actors is `experts.remote_directory`; what Ray adds to it is in `cluster.ray_directory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from experts.call import ExpertCall
from experts.worker import ExpertWorker


@dataclass(frozen=True)
class DirectoryStats:
    """Counters of a router's way to its experts."""

    local_rows: int
    remote_rows: int
    hop_seconds: float
    """Time spent waiting for remote rows, after the local ones were done."""
    failovers: int
    """Calls whose rows an actor did not answer and that were computed elsewhere."""


class ExpertDirectory(Protocol):
    """Computes calls for experts, wherever they are."""

    def run(self, call: ExpertCall) -> Tensor:
        """The call's R output rows, (R, D) in the expert dtype, in the call's order.

        Bitwise the same whatever actor computes a row. Raises ExpertError.
        """
        ...

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """Numbers of the experts of one layer that are in memory where they would be computed.

        Exact for this process; of an actor, what it held when its supervisor last asked, about a second ago.
        """
        ...

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        """A hint that a layer will probably ask for these experts next, likeliest first. Returns at once; may do
        nothing, and changes no result."""
        ...

    def stats(self) -> DirectoryStats: ...

    def close(self) -> None: ...


class LocalDirectory:
    """All experts in this process; costs no hop."""

    def __init__(self, worker: ExpertWorker) -> None:
        self.worker = worker

    def run(self, call: ExpertCall) -> Tensor:
        return self.worker.compute(call)

    def resident(self, component: str, layer: int) -> frozenset[int]:
        return self.worker.resident(component, layer)

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        self.worker.prefetch(component, layer, experts)

    def stats(self) -> DirectoryStats:
        return DirectoryStats(self.worker.stats.rows, 0, 0.0, 0)

    def close(self) -> None:
        """Nothing to close: the store belongs to the caller."""
