"""What was found out about one node of a running cluster, and what planning needs of it. Pure.

Filled by `cluster.ray_topology`; read by `cluster.cluster_checks` and whoever plans on a real cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.link_rate import Link
from cluster.machine_facts import MachineFacts
from cluster.topology import NodeFacts
from experts.node_memory import NodeMemory

SPARE_PERCENT = 10
"""Of a node's memory, left to others."""


@dataclass(frozen=True)
class ExpertShape:
    """Of the experts that are to be computed: model width, expert width, dtype."""

    width: int = 2048
    expert_width: int = 768
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Arithmetic:
    """What a machine's products are. digest: of the bits of some; equal where equal bits are computed."""

    numerics_class: str
    digest: str
    expert_bytes_s: float
    """Bytes of weights that are multiplied with one row in a second."""


@dataclass(frozen=True)
class StoreQuestion:
    """The store that is to be served, as every node is to look for it."""

    root: str
    hash: str
    shape: ExpertShape
    files: tuple[str, ...]
    """Of expert records, below the root: what a node that has them reads to measure its disk."""
    cache_folder: str | None = None
    """Where a node that does not have it would keep records, unless it has a folder of its own."""
    has_cards: bool = False
    """Whether cards are looked at, too."""


@dataclass(frozen=True)
class CardReport:
    """A node's card that would compute experts: its first."""

    memory: NodeMemory
    arithmetic: Arithmetic


@dataclass(frozen=True)
class NodeReport:
    """problem: why the node told nothing, or what could not be measured; the fields that it concerns are then None."""

    node_id: str
    address: str
    is_head: bool
    is_here: bool
    machine: MachineFacts | None = None
    arithmetic: Arithmetic | None = None
    disk_bytes_s: float = 0.0
    has_store: bool = False
    link: Link | None = None
    """To the machine that asks; None for that machine itself."""
    problem: str = ""
    link_problem: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    card: CardReport | None = None
    """None where there is none, or nobody asked."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.machine.name} ({self.address})" if self.machine else self.address


UNKNOWN_DISK_BYTES_S = 1e9
"""Taken where the disk's rate could not be measured."""


def as_node_facts(
    report: NodeReport,
    room_bytes: int,
    disk_bytes: int,
    card: CardReport | None = None,
    behind_bytes: int = 0,
) -> NodeFacts:
    """room_bytes, disk_bytes: for experts, in memory and of fetched records; see `cluster.node_rooms`. card: on which
    experts are computed there, and whose memory the room is; behind_bytes: of host memory behind it.

    Raises ValueError for a node that told nothing.
    """
    if report.machine is None or report.arithmetic is None:
        raise ValueError(f"{report.address} told nothing: {report.problem}")
    link, arithmetic = report.link, card.arithmetic if card else report.arithmetic
    return NodeFacts(
        report.node_id,
        report.address,
        room_bytes,
        report.machine.num_cores,
        arithmetic.expert_bytes_s,
        link.bandwidth_bytes_s if link else float("inf"),
        link.round_trip_s if link else 0.0,
        disk_bytes=disk_bytes,
        disk_bytes_s=report.disk_bytes_s or UNKNOWN_DISK_BYTES_S,
        has_store=report.has_store,
        numerics_class=arithmetic.numerics_class,
        gpus=report.machine.gpus[:1] if card else (),
        behind_bytes=behind_bytes,
        labels=dict(report.labels),
    )
