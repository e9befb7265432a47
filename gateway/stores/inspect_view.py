"""What `sage-moe inspect` prints for people; `--json` prints the summary as it is."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from extraction.errors import one_line
from extraction.summary import StoreSummary


def render_summary(summary: StoreSummary) -> RenderableType:
    """Whole-process totals first, then bytes by part; of a store with several components, also those."""
    moe = f"{summary.num_moe_layers} of {summary.num_layers} layers with {summary.experts_per_layer} experts"
    # Not as strings, in which rich takes [words] of a path or a manifest for markup.
    lines: list[RenderableType] = [
        Text(one_line(f"{summary.store}  ({summary.family}, {summary.kind}, {summary.dtype})")),
        *_cut_short(summary),
        *_partial(summary),
        *_quantised(summary),
        f"{moe}, {summary.experts_per_token} per token; "
        f"{summary.num_experts} experts of {format_size(summary.expert_bytes)}",
        "",
    ]
    totals = Table(title="Weights of the whole process, by experts resident per layer", title_justify="left")
    for column in ("state", "experts", "expert weights", "whole process", "saved"):
        totals.add_column(column, justify="left" if column == "state" else "right")
    for total in summary.totals:
        totals.add_row(
            total.state,
            str(total.experts_per_layer),
            format_size(total.expert_bytes),
            format_size(total.total_bytes),
            f"{total.reduction:.1%}",
        )
    table = Table(title=f"All experts against {summary.experts_per_token} per layer", title_justify="left")
    for column in ("component", "monolithic", "selective", "saved"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for row in summary.memory_table:
        cells = (format_size(row.monolithic_bytes), format_size(row.selective_bytes), f"{row.reduction:.1%}")
        table.add_row(row.component, *cells)
    note = "Weights only; the KV cache and buffers come on top. Output is the same at any residency."
    if len(summary.components) > 1:
        return Group(*lines, totals, "", table, "", _components(summary), note)
    return Group(*lines, totals, "", table, note)


def _cut_short(summary: StoreSummary) -> list[RenderableType]:
    return [Text(one_line(f"DAMAGED: {name} is cut short or missing")) for name in summary.files_cut_short]


def _partial(summary: StoreSummary) -> list[RenderableType]:
    if summary.left_out is None:
        return []
    layers = (f"layers {_ranges(numbers)} of {name}" for name, numbers in summary.left_out["layers"].items())
    share = summary.left_out["groups"]
    others = (
        [f"all experts but those of groups {_ranges(share['kept'])} of {share['total']}"] if share else []
    )
    parts = ", ".join([*summary.left_out["components"], *layers, *others])
    return [Text(one_line(f"PARTIAL, cannot be served; left out: {parts}"))]


def _quantised(summary: StoreSummary) -> list[RenderableType]:
    parts = {
        "Experts": summary.quantization,
        "Backbone": summary.backbone_quantization,
        "Head": summary.head_quantization,
    }
    lines: list[RenderableType] = []
    for part, quantization in parts.items():
        if quantization is not None:
            size = quantization["group_size"]
            scales = "a scale for each output row" if size is None else f"a scale for each group of {size}"
            lines.append(
                Text(f"{part} quantised to {quantization['scheme']}, {scales}: answers are modified")
            )
    return lines


def _ranges(numbers: list[int]) -> str:
    """`0-3,8`, from sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _components(summary: StoreSummary) -> Table:
    """Everything that the store holds; the tables above are about the first row."""
    table = Table(title="Components of the store", title_justify="left")
    for column in ("component", "MoE layers", "experts", "expert weights", "other weights"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for part in summary.components:
        name = f"{part.name} (served)" if part.is_served else part.name
        sizes = (format_size(part.expert_bytes), format_size(part.backbone_bytes))
        table.add_row(Text(name), str(part.num_moe_layers), str(part.num_experts), *sizes)
    return table


def format_size(num_bytes: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"
