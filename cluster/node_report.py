"""What was found out about one node of a running cluster, and what planning needs of it. Pure.

Filled by `cluster.ray_topology`; read by `cluster.cluster_checks` and whoever plans on a real cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.link_rate import Link
from cluster.machine_facts import MachineFacts
from cluster.node_speed import Arithmetic, ExpertShape
from cluster.topology import NodeFacts, Topology

SPARE_PERCENT = 10
"""Of a node's memory, left to others."""
ACTOR_BASE_BYTES = 256 << 20
"""An expert actor's process that holds nothing yet; measured (docs/memory.md)."""


@dataclass(frozen=True)
class StoreQuestion:
    """The store that is to be served, as every node is to look for it."""

    root: str
    hash: str
    shape: ExpertShape
    files: tuple[str, ...]
    """Of expert records, below the root: what a node that has them reads to measure its disk."""


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

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.machine.name} ({self.address})" if self.machine else self.address


UNKNOWN_DISK_BYTES_S = 1e9
"""Taken where the disk's rate could not be measured."""


def as_node_facts(report: NodeReport, reserved_bytes: int = 0) -> NodeFacts:
    """reserved_bytes: what else will run there, such as the router with its cache. Raises ValueError for a node that
    told nothing."""
    if report.machine is None or report.arithmetic is None:
        raise ValueError(f"{report.address} told nothing: {report.problem}")
    memory = report.machine.memory
    room = (
        memory.available_bytes - memory.total_bytes * SPARE_PERCENT // 100 - ACTOR_BASE_BYTES - reserved_bytes
    )
    link = report.link
    return NodeFacts(
        report.node_id,
        report.address,
        max(0, room),
        report.machine.num_cores,
        report.arithmetic.expert_bytes_s,
        link.bandwidth_bytes_s if link else float("inf"),
        link.round_trip_s if link else 0.0,
        disk_bytes=report.machine.cache_free_bytes,
        disk_bytes_s=report.disk_bytes_s or UNKNOWN_DISK_BYTES_S,
        has_store=report.has_store,
        numerics_class=report.arithmetic.numerics_class,
        gpus=report.machine.gpus,
        labels=dict(report.labels),
    )


def as_topology(reports: Iterable[NodeReport], router_reserved_bytes: int = 0) -> Topology:
    """Of all nodes that can be used; the router runs on the node that asked. Raises ValueError without that one."""
    usable = [
        report
        for report in reports
        if report.machine is not None and (report.link is not None or report.is_here)
    ]
    here = [report.node_id for report in usable if report.is_here]
    if not here:
        raise ValueError("this machine's own node told nothing")
    nodes = tuple(
        as_node_facts(report, router_reserved_bytes if report.node_id == here[0] else 0) for report in usable
    )
    return Topology(nodes, here[0])
