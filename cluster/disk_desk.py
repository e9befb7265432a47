"""What every machine's disk holds and is to hold: sources of records, second copies, and who computes what is lost.

From what expert actors say of their machines' disks follow, for each of them, the peers that it fetches from, the
records that it keeps beside its own group's, and for routers the actors that can compute an expert whose own actors are
gone. Pure; the Ray shell is `cluster.disk_keeper`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.disk_copies import DiskNode, plan_disk_copies
from experts.actor_report import DiskReport
from experts.roster import Owners
from extraction.manifest import ExpertKey

MOST_PEERS = 4
"""That an actor is told of: each may be asked in vain before the next."""
MOST_FALLBACKS = 2
"""Of an expert: rosters carry their names."""

Address = tuple[str, int]


@dataclass(frozen=True)
class Keeper:
    """An expert actor that is ready, as far as its machine's disk counts."""

    name: str
    node: str
    group: frozenset[ExpertKey]
    report: DiskReport
    ordered: frozenset[ExpertKey] = frozenset()
    """What it was told to keep beside its group."""
    takes_orders: bool = True
    """Whether it may be told more: not after it has refused."""


@dataclass(frozen=True)
class DiskDecision:
    """What follows from one look at all disks."""

    peers: Mapping[str, tuple[Address, ...]] = field(default_factory=dict)
    """By actor: where others' records are, best first; only of those that still fetch."""
    holds: Mapping[str, tuple[ExpertKey, ...]] = field(default_factory=dict)
    """By actor: what it is to keep in addition."""
    fallbacks: Owners = field(default_factory=dict)
    single: tuple[ExpertKey, ...] = ()
    """On one disk only, when everything is there that was ordered: not failover-safe."""
    absent: tuple[ExpertKey, ...] = ()


def decide_disks(
    record_bytes: Mapping[ExpertKey, int],
    keepers: Sequence[Keeper],
    head: str | None,
    coming: Mapping[str, frozenset[ExpertKey]] | None = None,
) -> DiskDecision:
    """record_bytes: of every expert that is served. head: the node of the routers, which has the whole store and
    computes from it; None where nobody knows. coming: by node, groups of actors that have not said anything yet; they
    will fetch them, so that nobody else has to."""
    coming = coming or {}
    everything = frozenset(record_bytes)
    by_node: dict[str, list[Keeper]] = defaultdict(list)
    for keeper in sorted(keepers, key=lambda keeper: keeper.name):
        by_node[keeper.node].append(keeper)
    held = {node: _held(there, everything) for node, there in by_node.items()}
    if head is not None:
        held[head] = everything
    nodes = [
        _disk_node(node, held.get(node, frozenset()), by_node.get(node, ()), coming.get(node, frozenset()))
        for node in sorted({*held, *coming})
    ]
    copies = plan_disk_copies(record_bytes, nodes)
    holds = {_taker(by_node[order.node]).name: order.keys for order in copies.orders}
    return DiskDecision(
        {
            keeper.name: peers_for(missing, keeper.node, keepers)
            for keeper in keepers
            if (missing := _missing(keeper))
        },
        holds,
        _fallbacks(everything, by_node, held),
        copies.single,
        copies.absent,
    )


def _held(keepers: Sequence[Keeper], everything: frozenset[ExpertKey]) -> frozenset[ExpertKey]:
    if any(keeper.report.is_whole for keeper in keepers):
        return everything
    return frozenset().union(*(keeper.report.held for keeper in keepers))


def _disk_node(
    node: str, held: frozenset[ExpertKey], keepers: Sequence[Keeper], coming: frozenset[ExpertKey]
) -> DiskNode:
    promised = coming.union(*(keeper.group | keeper.ordered for keeper in keepers))
    rooms = [keeper.report.free_bytes for keeper in keepers]
    takes = any(keeper.takes_orders and not keeper.report.is_whole for keeper in keepers)
    return DiskNode(node, held, promised, min(rooms) if takes else 0)


def _taker(keepers: Sequence[Keeper]) -> Keeper:
    """Who keeps what its machine is to keep."""
    return next(keeper for keeper in keepers if keeper.takes_orders and not keeper.report.is_whole)


def _missing(keeper: Keeper) -> frozenset[ExpertKey]:
    """What it still has to fetch."""
    if keeper.report.is_whole:
        return frozenset()
    return (keeper.group | keeper.ordered) - keeper.report.held


def peers_for(
    missing: frozenset[ExpertKey], node: str | None, keepers: Sequence[Keeper]
) -> tuple[Address, ...]:
    """Who has some of these records for an actor on that node: one server of each other machine, those with most
    first."""
    found: dict[str, frozenset[ExpertKey]] = defaultdict(frozenset)
    servers: dict[str, Address] = {}
    for keeper in sorted(keepers, key=lambda keeper: keeper.name):
        report = keeper.report
        found[keeper.node] |= missing if report.is_whole else missing & report.held
        if report.weights is not None:
            servers.setdefault(keeper.node, report.weights)
    useful = sorted((-len(there), name) for name, there in found.items() if there and name != node)
    return tuple(servers[name] for _, name in useful if name in servers)[:MOST_PEERS]


def _fallbacks(
    everything: Collection[ExpertKey],
    by_node: Mapping[str, Sequence[Keeper]],
    held: Mapping[str, frozenset[ExpertKey]],
) -> Owners:
    """Actors with an expert's record on their machine's disk whose group it is not. Dealt out by an expert's number, so
    that a lost group's rows are spread."""
    able: dict[ExpertKey, list[str]] = {}
    for key in everything:
        names = [
            keeper.name
            for node, there in sorted(by_node.items())
            if key in held[node]
            for keeper in there
            if key not in keeper.group
        ]
        if names:
            first = key.expert % len(names)
            able[key] = (names[first:] + names[:first])[:MOST_FALLBACKS]
    return {key: tuple(names) for key, names in able.items()}
