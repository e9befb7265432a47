"""A plan as people read it; `--json` prints the same values."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gateway.planning.nodes import RouterMemory
from gateway.planning.report import PlanReport
from gateway.stores.inspect_view import format_size

COLUMNS = ("node", "experts", "room", "held", "disk", "copies", "free", "calls", "KB", "ms")
"""Room for experts; of its own: held in memory, and on disk; copies of others' in memory; per token: calls, and both
ways' bytes, and its own computing."""
BETWEEN = frozenset({"copies", "calls", "KB"})
"""Of them, what is about other machines: left out where there is one."""
GIB, MIB = 1 << 30, 1 << 20


def render_plan(report: PlanReport) -> RenderableType:
    """Names in it come from the user's own file, whose characters were checked. One machine hears nothing of others."""
    foretold, memory = report.forecast, report.router_memory
    router = next(node.node for node in report.nodes if node.is_router)
    low, high = foretold.tokens_per_s
    lines = [
        f"{report.source}: {report.num_experts} experts of {format_size(report.expert_bytes)} ({report.experts}), "
        f"{format_size(report.total_expert_bytes)} in all; {_streams(report.num_streams)} of {report.context} tokens",
        f"on {router} beside experts: backbone {format_size(memory.backbone_bytes)}, KV cache "
        f"{format_size(memory.kv_bytes)}, buffers {format_size(memory.buffer_bytes)}, processes "
        f"{format_size(memory.process_bytes)}, {_media(memory)}left free {format_size(memory.spare_bytes)}",
    ]
    if report.quantization is not None:
        lines.insert(1, f"quantised: {report.quantization}")
    network = f"; of a token, network alone {_ms(foretold.network_floor_s)}" if len(report.nodes) > 1 else ""
    facts = [
        report.verdict,
        f"tokens/s, all streams: {_short(low)} to {_short(high)}",
        f"per step: backbone {_ms(foretold.backbone_s)}, experts {_ms(foretold.expert_s)}{network}",
        f"context: room for {report.context_left} tokens a stream, if what is free on {router} went to the cache",
    ]
    if len(report.nodes) > 1:
        facts += _between_machines(report)
    return Group(
        *map(Text, lines),
        Text(),
        _nodes(report),
        *(Text(line) for line in facts),
        *(Text(f"note: {note}") for note in report.notes),
        Text(),
        *(Text(command) for command in report.commands),
    )


def _media(memory: RouterMemory) -> str:
    held = {"images and sound": memory.media_bytes, "speech": memory.speech_bytes}
    return "".join(f"{what} {format_size(nbytes)}, " for what, nbytes in held.items() if nbytes)


def _between_machines(report: PlanReport) -> list[str]:
    traffic = report.forecast.traffic
    return [
        f"messages: {_short(traffic.messages)} per token, {report.forecast.messages_per_layer:.2f} per layer; "
        f"{traffic.bytes / 1e3:.1f} KB per token",
        f"on one machine only, in memory or on disk: {report.num_single_copies} of {report.num_experts} experts",
        _other_way(report),
    ]


def _nodes(report: PlanReport) -> RenderableType:
    unit, factor = ("GiB", GIB) if report.total_expert_bytes >= GIB else ("MiB", MIB)
    has_others = len(report.nodes) > 1
    shown = [column for column in COLUMNS if has_others or column not in BETWEEN]
    copies = "copies of others', " if has_others else ""
    traffic = "calls, KB both ways, " if has_others else ""
    what = (
        f"Machines, in {unit}: room for experts; its own held in memory, and left on disk;",
        f"{copies}what stays free. Per token: {traffic}ms of computing",
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in shown:
        table.add_column(column, justify="left" if column == "node" else "right", no_wrap=column != "node")
    for node in report.nodes:
        sizes = (node.room_bytes, node.resident_bytes, node.disk_bytes, node.replica_bytes, node.left_bytes)
        cells = (
            f"{node.node} (router)" if node.is_router else node.node,
            str(node.num_experts),
            *(f"{size / factor:.1f}" for size in sizes),
            f"{node.messages:.1f}",
            f"{node.bytes / 1e3:.1f}",
            f"{node.compute_s * 1e3:.1f}",
        )
        by_column = dict(zip(COLUMNS, cells, strict=True))
        table.add_row(*(Text(by_column[column]) for column in shown))
    return Group(*map(Text, what), table)


def _other_way(report: PlanReport) -> str:
    other, high = report.other_grouping, report.other_grouping.tokens_per_s[1]
    way = "whole layers to machines" if report.grouping == "expert" else "each layer over all machines"
    return (
        f"{way} instead: up to {_short(high)} tokens/s, {_short(other.traffic.messages)} messages per token"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _streams(number: int) -> str:
    return "1 stream" if number == 1 else f"{number} streams"
