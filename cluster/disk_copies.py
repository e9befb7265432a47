"""Which experts are copied to which node's disk, so that each lies on two disks where space allows. Pure.

Failover without a replica computes a lost actor's experts from a survivor's disk: an expert of which only one disk has
a copy is lost with it, and is listed as not failover-safe. Called by `cluster.supervisor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.plan import ServicePlan
from cluster.topology import Topology
from extraction.manifest import ExpertKey

COPIES = 2


@dataclass(frozen=True)
class DiskNode:
    """A machine as far as its disk counts."""

    name: str
    held: frozenset[ExpertKey]
    """Records that it has, in a whole store or in its cache."""
    group: frozenset[ExpertKey] = frozenset()
    """Of all its actors together: what it has or will fetch whatever is decided here."""
    room_bytes: int | None = None
    """For records that it has not got, those of its group included; None means more than enough."""


@dataclass(frozen=True)
class CopyOrder:
    """One node is to fetch these, beside its own group."""

    node: str
    keys: tuple[ExpertKey, ...]
    nbytes: int


@dataclass(frozen=True)
class DiskCopyPlan:
    """What to do, and what is left undone."""

    orders: tuple[CopyOrder, ...]
    single: tuple[ExpertKey, ...]
    """On one disk only, when all that is ordered and all groups are there: not failover-safe."""
    absent: tuple[ExpertKey, ...]
    """On no disk at all."""

    @property
    def is_failover_safe(self) -> bool:
        return not (self.single or self.absent)


def disk_nodes(
    plan: ServicePlan, topology: Topology, held: Mapping[str, frozenset[ExpertKey]]
) -> tuple[DiskNode, ...]:
    """The machines of a plan as their disks count: the routers', and those with actors, since nobody computes from the
    others' disks. held: what each node's processes say is on its disk, by node id; of a node with the whole store
    nothing needs to be said. An actor that Ray may place anywhere counts nowhere."""
    groups: dict[str, set[ExpertKey]] = {node.node_id: set() for node in topology.nodes}
    for actor in plan.actors:
        if actor.node_id in groups:
            groups[actor.node_id].update(plan.group(actor.group).keys)
    everything = frozenset(key for group in plan.groups for key in group.keys) | frozenset(plan.router_keys)
    return tuple(
        DiskNode(
            node.node_id,
            everything if node.has_store else held.get(node.node_id, frozenset()),
            frozenset(groups[node.node_id]),
            node.disk_bytes,
        )
        for node in topology.nodes
        if groups[node.node_id] or node.node_id == topology.router_node
    )


def plan_disk_copies(
    sizes: Mapping[ExpertKey, int], nodes: Sequence[DiskNode], copies: int = COPIES
) -> DiskCopyPlan:
    """sizes: bytes of every expert that is served. copies: disks that each of them should be on.

    A node's own group comes first, since it is fetched in any case. Then the experts with the fewest copies go, one
    by one, to the node with the most room, of equals to the one with the fewest bytes ordered, then by name: room is
    used evenly, and the same facts give the same plan. Nothing that is on a disk is moved. O(E x N).
    """
    places = {key: {node.name for node in nodes if key in node.held or key in node.group} for key in sizes}
    room = {node.name: _room_after_group(node, sizes) for node in nodes}
    ordered: dict[str, list[ExpertKey]] = {node.name: [] for node in nodes}
    ordered_bytes = dict.fromkeys(room, 0)
    for missing in range(copies, 0, -1):
        for key in sorted(key for key, there in places.items() if len(there) == copies - missing):
            _copy(key, sizes[key], missing, places[key], room, ordered, ordered_bytes)
    orders = tuple(
        CopyOrder(name, tuple(sorted(keys)), ordered_bytes[name])
        for name, keys in sorted(ordered.items())
        if keys
    )
    single = tuple(sorted(key for key, there in places.items() if len(there) == 1))
    return DiskCopyPlan(orders, single, tuple(sorted(key for key, there in places.items() if not there)))


def _copy(
    key: ExpertKey,
    nbytes: int,
    num_missing: int,
    places: set[str],
    room: dict[str, float],
    ordered: dict[str, list[ExpertKey]],
    ordered_bytes: dict[str, int],
) -> None:
    """Give an expert up to so many further places. One that is nowhere has nobody to be copied from."""
    for _ in range(num_missing if places else 0):
        able = [name for name, left in room.items() if name not in places and left >= nbytes]
        if not able:
            return
        name = min(able, key=lambda name: (-room[name], ordered_bytes[name], name))
        places.add(name)
        ordered[name].append(key)
        ordered_bytes[name] += nbytes
        room[name] -= nbytes


def _room_after_group(node: DiskNode, sizes: Mapping[ExpertKey, int]) -> float:
    if node.room_bytes is None:
        return math.inf
    return node.room_bytes - sum(sizes.get(key, 0) for key in node.group - node.held)
