"""The memory plan as a table: printed by `serve` and `generate` at their start and by `status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

COLUMNS = ("node", "tier", "process", "backbone", "KV", "buffers", "experts", "of", "share")
MIB = 1 << 20
HOST_TIER = "host"
"""As `cluster.device_plan` has it, which would bring PyTorch here."""


def render_memory(
    plan: Mapping[str, Any],
    resident: Mapping[str, int] | None = None,
    behind: Mapping[str, int] | None = None,
) -> Table:
    """plan: `MemoryPlan.as_json()`, its texts safe to print. resident: bytes that each process holds now where it
    computes, by name. behind: the same in host memory behind a device."""
    title = "Memory (MiB)" if resident is None else "Memory as divided at the start, and experts' now (MiB)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in COLUMNS if resident is None else (*COLUMNS, "now"):
        is_text = column in COLUMNS[:3]
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "node")
    for row in plan["processes"]:
        sizes = [
            row["backbone_bytes"],
            row["kv_bytes"] + row["swap_bytes"],
            row["buffer_bytes"],
            row["budget_bytes"],
            row["expert_bytes"],
        ]
        texts = (str(row[name]) for name in COLUMNS[:3])
        held = behind if row["tier"] == HOST_TIER else resident
        now = () if resident is None else (_mib((held or {}).get(row["process"], 0)),)
        table.add_row(*texts, *map(_mib, sizes), _share(row["budget_bytes"], row["expert_bytes"]), *now)
    # Below the table, which would not fit a terminal with one column more.
    kinds = {
        "stand-ins for experts": "stand_in_bytes",
        "images and sound": "media_bytes",
        "speech": "speech_bytes",
    }
    beside = [text for what, field in kinds.items() if (text := _beside(plan, what, field))]
    table.caption = f"Beside the budget, {'; '.join(beside)}" if beside else None
    table.caption_justify = "left"
    return table


def _beside(plan: Mapping[str, Any], what: str, field: str) -> str | None:
    """What processes hold of a kind, where they hold any."""
    held = [f"{_mib(n)} in {row['process']}" for row in plan["processes"] if (n := row.get(field, 0))]
    return f"{what}: {', '.join(held)}" if held else None


def _mib(num_bytes: float) -> str:
    """Two digits where one would hide the number."""
    mib = num_bytes / MIB
    return f"{mib:.2f}" if 0 < mib < 10 else f"{mib:.1f}"


def _share(budget_bytes: int, expert_bytes: int) -> str:
    """Of its experts that a process can keep; more than all of them is all."""
    return f"{min(1.0, budget_bytes / expert_bytes):.1%}" if expert_bytes else ""
