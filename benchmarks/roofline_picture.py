"""Draws what `bench_roofline` measured: a step's time as multiples of its bound, and each phase's bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.step_watch import PHASES

COLOURS = ("#3b6ea5", "#8c6bb1", "#41856b", "#b9a44c", "#b5653a", "#888888", "#cccccc")
READING = ("attention", "experts", "head")
"""Phases whose bytes are most of a step's."""


def draw(found: Mapping[int, Mapping[str, Any]], gb_per_s: float, title: str, path: Path) -> None:
    """found: by number of streams. gb_per_s: the memory's. Raises ModuleNotFoundError without the extra `plot`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 5.4), layout="constrained")
    steps, rates = figure.subplots(1, 2)
    counts = list(found)
    places = list(range(len(counts)))
    _draw_steps(steps, found, places)
    _draw_rates(rates, found, places, gb_per_s)
    for axes in (steps, rates):
        axes.set_xticks(places, [str(count) for count in counts])
        axes.set_xlabel("streams")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"A decode step against the memory's bandwidth: {title}")
    figure.savefig(path, dpi=130)


def _draw_steps(axes: Any, found: Mapping[int, Mapping[str, Any]], places: list[int]) -> None:
    bounds = [figures["bound_ms"]["bytes"] for figures in found.values()]
    bottom = [0.0] * len(places)
    for phase, colour in zip(PHASES, COLOURS, strict=True):
        heights = [f["phase_ms"][phase] / b for f, b in zip(found.values(), bounds, strict=True)]
        axes.bar(places, heights, 0.6, bottom=bottom, color=colour, label=phase)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, top, figures in zip(places, bottom, found.values(), strict=True):
        axes.text(place, top, f"{figures['step_ms']['median']:.0f} ms", ha="center", va="bottom", fontsize=9)
    axes.axhline(1.0, color="black", linewidth=1.2, label="its bytes at full bandwidth")
    products = [f["bound_ms"]["products"] / b for f, b in zip(found.values(), bounds, strict=True)]
    axes.plot(places, products, "v", color="black", markersize=7, label="its products at the full rate")
    bare = [
        (place, f["bare_linear_ms"]["median"] / bound)
        for place, f, bound in zip(places, found.values(), bounds, strict=True)
        if f["bare_linear_ms"] is not None
    ]
    if bare:
        axes.plot(
            *zip(*bare, strict=True), "D", color="#c0392b", markersize=6, label="the same as bare F.linear"
        )
    axes.set_ylabel("time of a step / time to read its bytes")
    axes.set_ylim(0, 1.12 * max(*bottom, *(height for _, height in bare), 1.0))
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)


def _draw_rates(
    axes: Any, found: Mapping[int, Mapping[str, Any]], places: list[int], gb_per_s: float
) -> None:
    for phase in READING:
        colour = COLOURS[PHASES.index(phase)]
        rates = [figures["phase_gb_per_s"][phase] for figures in found.values()]
        axes.plot(places, rates, "o-", color=colour, label=phase)
    axes.axhline(gb_per_s, color="black", linewidth=1.2, label=f"the memory at its best: {gb_per_s:.0f} GB/s")
    axes.set_ylim(0, gb_per_s * 1.25)
    axes.set_ylabel("bytes read once / time of the phase, GB/s")
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
