"""Where a router finds experts: the protocol it knows, and the implementation without any actor.

The implementation over actors is `experts.remote_directory`; what Ray adds to it is in `cluster.ray_directory`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from experts.call import ExpertCall
from experts.call_times import LatencySummary
from experts.errors import LossKind
from experts.expert_table import ExpertTable
from experts.worker import ExpertWorker

if TYPE_CHECKING:
    from experts.exchange import Exchange

FailureKind = Literal[LossKind, "error", "not finite"]
"""Why an actor's answer could not be used."""
FAILURE_KINDS: tuple[FailureKind, ...] = ("lost", "late", "silent", "error", "not finite")


@dataclass(frozen=True)
class AuditStats:
    """Counters of answers that were computed again elsewhere; see `experts.audit`."""

    done: int = 0
    disagreed: int = 0
    undecided: int = 0
    """Of those that disagreed, where nobody could say who was right."""
    owed: int = 0
    """Due, but not done for want of time; made up for later."""


@dataclass(frozen=True)
class DirectoryStats:
    """Counters of a router's way to its experts."""

    local_rows: int
    remote_rows: int
    hop_seconds: float
    """Time spent waiting for remote rows, after the local ones were done."""
    failovers: int
    """Calls whose rows an actor did not answer and that were computed elsewhere."""
    failovers_by_kind: Mapping[FailureKind, int] = field(
        default_factory=lambda: dict.fromkeys(FAILURE_KINDS, 0)
    )
    """Of these, by what was wrong."""
    foreign_rows: int = 0
    """See ExpertDirectory.foreign_rows."""
    audits: AuditStats = AuditStats()
    num_quarantined: int = 0
    """Lives of actors that gave wrong rows, and are not asked any more."""
    quarantined: tuple[str, ...] = ()
    """The latest of these, as name/incarnation."""
    latencies: Mapping[str, LatencySummary] = field(default_factory=dict)
    """Actor name -> of its latest answers, from the call to its last row."""


class ExpertDirectory(Protocol):
    """Computes calls for experts, wherever they are."""

    @property
    def foreign_rows(self) -> int:
        """Rows so far that were computed in another numerics class than this process's, and are not bitwise the same
        as its own."""
        ...

    @property
    def num_quarantined(self) -> int:
        """Lives of actors so far that were found to give wrong rows; earlier ones may have been wrong as well."""
        ...

    def run(self, call: ExpertCall) -> Tensor:
        """The call's R output rows, (R, D) in the expert dtype, in the call's order.

        Bitwise the same whatever actor of this numerics class computes a row. Raises ExpertError.
        """
        ...

    def table(self, component: str, layer: int) -> ExpertTable | None:
        """All experts of one layer, where they are in this process's memory for good, so that the caller may compute
        with them itself and say so by `note_use`. None: ask `run`."""
        ...

    def exchange(self, component: str, layers: tuple[int, ...], num_experts: int) -> Exchange | None:
        """The way to all experts of some layers, where the C source can go it without Python. None: ask `run`."""
        ...

    def note_use(self, table: ExpertTable, used: Sequence[int], num_rows: int) -> None:
        """A call of so many rows was computed with a table. used: numbers of the experts."""
        ...

    def load_more(self) -> bool:
        """Read one more expert of those that will stay in this process's memory for good, while nothing else is to be
        done. False where there is none to read."""
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

    foreign_rows = 0
    num_quarantined = 0

    def __init__(self, worker: ExpertWorker) -> None:
        self.worker = worker

    def run(self, call: ExpertCall) -> Tensor:
        return self.worker.compute(call)

    def table(self, component: str, layer: int) -> ExpertTable | None:
        return self.worker.table(component, layer)

    def exchange(self, component: str, layers: tuple[int, ...], num_experts: int) -> Exchange | None:
        return None

    def note_use(self, table: ExpertTable, used: Sequence[int], num_rows: int) -> None:
        self.worker.note_use(table, used, num_rows)

    def load_more(self) -> bool:
        return self.worker.load_more()

    def resident(self, component: str, layer: int) -> frozenset[int]:
        return self.worker.resident(component, layer)

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        self.worker.prefetch(component, layer, experts)

    def stats(self) -> DirectoryStats:
        return DirectoryStats(self.worker.stats.rows, 0, 0.0, 0)

    def close(self) -> None:
        """Nothing to close: the store belongs to the caller."""
