"""The memory plan as a table: printed by `serve` and `generate` at their start and by `status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

COLUMNS = ("node", "tier", "process", "backbone", "KV", "buffers", "experts", "of", "share")


def render_memory(plan: Mapping[str, Any], resident: Mapping[str, int] | None = None) -> Table:
    """plan: `MemoryPlan.as_json()`, its texts safe to print. resident: bytes that each process holds now, by name."""
    table = Table(title="Memory", title_justify="left")
    texts = COLUMNS[:3]
    for column in COLUMNS if resident is None else (*COLUMNS, "now"):
        table.add_column(column, justify="left" if column in texts else "right", no_wrap=True)
    for row in plan["processes"]:
        now = () if resident is None else (format_size(resident.get(row["process"], 0)),)
        table.add_row(
            str(row["node"]),
            str(row["tier"]),
            str(row["process"]),
            format_size(row["backbone_bytes"]),
            format_size(row["kv_bytes"] + row["swap_bytes"]),
            format_size(row["buffer_bytes"]),
            format_size(row["budget_bytes"]),
            format_size(row["expert_bytes"]),
            _share(row["budget_bytes"], row["expert_bytes"]),
            *now,
        )
    return table


def format_size(num_bytes: float) -> str:
    if not num_bytes:
        return "-"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"


def _share(budget_bytes: int, expert_bytes: int) -> str:
    """Of its experts that a process can keep; more than all of them is all."""
    return f"{min(1.0, budget_bytes / expert_bytes):.1%}" if expert_bytes else "-"
