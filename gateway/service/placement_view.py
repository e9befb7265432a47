"""Which machine holds what, as `serve` prints it at its start; `--dry-run` prints the same values. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.expert_names import by_layer, name_experts
from cluster.plan import ActorPlan
from cluster.topology import NodeFacts
from extraction.errors import one_line
from extraction.manifest import ExpertKey
from gateway.service.placing import Placed

MIB = 1 << 20
COLUMNS = ("machine", "store", "process", "experts", "in memory", "on disk")


def placement_json(placed: Placed) -> dict[str, Any]:
    """Plain values; experts by layer."""
    plan, sizes = placed.plan, placed.placing.demand.sizes
    return {
        "demand": placed.demand_source,
        "router_node": placed.topology.router_node,
        "router_experts": by_layer(plan.router_keys),
        "router_budget_bytes": plan.router_budget_bytes,
        "nodes": [_node_json(placed, node) for node in placed.topology.nodes],
        "left_out": {placed.names.get(node_id, node_id): why for node_id, why in placed.refused.items()},
        "groups": {
            group.name: {"bytes": sum(sizes[key] for key in group.keys), "experts": by_layer(group.keys)}
            for group in plan.groups
        },
        "single_copies": by_layer(placed.copies.single),
        "is_failover_safe": placed.copies.is_failover_safe,
    }


def _node_json(placed: Placed, node: NodeFacts) -> dict[str, Any]:
    return {
        "node_id": node.node_id,
        "name": placed.names.get(node.node_id, node.node_id),
        "room_bytes": node.room_bytes,
        "has_store": node.has_store,
        "numerics_class": node.numerics_class,
        "actors": [
            {
                "actor": actor.name,
                "group": actor.group,
                "device": "cuda" if actor.num_gpus else "cpu",
                "budget_bytes": actor.budget_bytes,
                "host_budget_bytes": actor.host_budget_bytes,
                "is_replica": not _is_first(placed, actor),
            }
            for actor in placed.plan.actors
            if actor.node_id == node.node_id
        ],
    }


def render_placement(placed: Placed) -> RenderableType:
    """Names come from machines of the cluster, and are made safe to print."""
    table = Table(title="Placement (MiB)", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        is_text = column in COLUMNS[:3]
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "machine")
    for node in placed.topology.nodes:
        for index, row in enumerate(_rows(placed, node)):
            name = one_line(placed.names.get(node.node_id, node.node_id)) if index == 0 else ""
            store = ("yes" if node.has_store else "fetches") if index == 0 else ""
            table.add_row(Text(name), store, *row)
    return Group(table, *map(Text, placement_lines(placed)))


def _rows(placed: Placed, node: NodeFacts) -> Iterable[tuple[str, ...]]:
    plan, sizes = placed.plan, placed.placing.demand.sizes
    rows = []
    if node.node_id == placed.topology.router_node:
        rows.append(_row("router", plan.router_keys, sizes, plan.router_budget_bytes))
    for actor in plan.actors:
        if actor.node_id == node.node_id:
            name = actor.name if _is_first(placed, actor) else f"{actor.name} (replica)"
            rows.append(_row(name, plan.group(actor.group).keys, sizes, actor.budget_bytes))
    return rows or [("holds nothing", "", "", "")]


def _row(
    name: str, keys: Collection[ExpertKey], sizes: Mapping[ExpertKey, int], budget_bytes: int | None
) -> tuple[str, ...]:
    total = sum(sizes[key] for key in keys)
    held = total if budget_bytes is None else min(total, budget_bytes)
    return name, str(len(keys)), f"{held / MIB:.1f}", f"{(total - held) / MIB:.1f}"


def _is_first(placed: Placed, actor: ActorPlan) -> bool:
    return next(other for other in placed.plan.actors if other.group == actor.group) is actor


def placement_lines(placed: Placed) -> list[str]:
    """What the table does not say."""
    topology = placed.topology
    lines = [f"Expected use of experts: {one_line(placed.demand_source)}"]
    for node_id, why in placed.refused.items():
        lines.append(f"note: {one_line(placed.names.get(node_id, node_id))} holds nothing: {one_line(why)}")
    if not placed.plan.groups and len(topology.nodes) > 1:
        lines.append(
            "note: all experts stay with the routers: messages would take longer than other machines save"
        )
    own_class = topology.node(topology.router_node).numerics_class
    for node in topology.nodes:
        if node.numerics_class not in ("", own_class):
            name = one_line(placed.names.get(node.node_id, node.node_id))
            lines.append(
                f"note: {name} computes other bits ({node.numerics_class}): equal within a tolerance only, see "
                "docs/exactness.md"
            )
    if placed.copies.absent:
        lines.append(f"not failover-safe: on no disk: {name_experts(by_layer(placed.copies.absent))}")
    if placed.copies.single:
        number = len(placed.copies.single)
        lines.append(
            f"not failover-safe: {number} experts on one disk only: {name_experts(by_layer(placed.copies.single))}"
        )
    return lines
