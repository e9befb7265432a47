"""Pictures of an evaluation, by matplotlib (the extra `plot`), without a display. Each function draws on axes that it
is given and decides nothing. Called by `gateway.evaluation.page` and `benchmarks/quality.py`.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gateway.errors import EvaluationFailed
from router.trace_statistics import BELADY, MissCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart also by those who see few colours (Okabe and Ito)."""
MARKERS = "os^Dvx"
USE_SCALE = 4.0
"""Multiples of an even share at which colours end; the same for every text, so that they can be compared."""


@dataclass(frozen=True)
class FrontierPoint:
    """One way to run a model: what it costs in misses and in quality."""

    miss_rate: float
    perplexity: float
    label: str = ""
    interval: tuple[float, float] | None = None
    """95% of the perplexity."""


def check_plots() -> None:
    """Raises EvaluationFailed where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationFailed("pictures need matplotlib: pip install 'sage-moe[plot]'")


def new_figure(width: float, height: float) -> Figure:
    """Inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw_use(axes: Axes, counts_LE: np.ndarray, layers: Sequence[int], title: str) -> None:
    """How often each expert was chosen, as multiples of an even share.

    counts_LE: of all layers; layers: those that are shown.
    """
    use_LE = counts_LE[list(layers)]
    even_L1 = np.maximum(use_LE.sum(axis=1, keepdims=True), 1) / use_LE.shape[1]
    image = axes.imshow(
        use_LE / even_L1, cmap="viridis", aspect="auto", interpolation="nearest", vmin=0.0, vmax=USE_SCALE
    )
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(*_layer_ticks(layers))
    axes.figure.colorbar(image, ax=axes, label="times even", fraction=0.04, pad=0.02, extend="max")


def _layer_ticks(layers: Sequence[int]) -> tuple[list[int], list[str]]:
    step = max(1, len(layers) // 12)
    places = list(range(0, len(layers), step))
    return places, [str(layers[place]) for place in places]


def draw_layers(
    axes: Axes, layers: Sequence[int], lines: Mapping[str, np.ndarray], title: str, unit: str
) -> None:
    """One value a layer, one line a text."""
    for number, (name, values_L) in enumerate(lines.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(range(len(layers)), values_L, color=colour, marker=marker, markersize=4, label=name)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("layer")
    axes.set_ylabel(unit)
    axes.set_xticks(*_layer_ticks(layers))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_coactivation(axes: Axes, ratio_EE: np.ndarray, title: str) -> None:
    """Which experts serve the same tokens, on a scale on which half and twice as often lie equally far from 1."""
    with np.errstate(divide="ignore"):
        logs_EE = np.log2(ratio_EE)
    image = axes.imshow(
        np.clip(logs_EE, -3.0, 3.0), cmap="RdBu_r", vmin=-3.0, vmax=3.0, interpolation="nearest"
    )
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("expert")
    axes.set_ylabel("expert")
    bar = axes.figure.colorbar(
        image, ax=axes, label="times as often as by use alone", fraction=0.046, pad=0.02
    )
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])


def draw_miss_curves(axes: Axes, shares: Sequence[float], curves: Sequence[MissCurve], title: str) -> None:
    for number, curve in enumerate(curves):
        style = "--" if curve.eviction == BELADY else "-"
        axes.plot(
            shares,
            curve.miss_rates,
            style,
            color="black" if curve.eviction == BELADY else COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=f"{curve.eviction} (optimum)" if curve.eviction == BELADY else curve.eviction,
        )
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("resident share of all experts")
    axes.set_ylabel("missed share of expert uses")
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(0.0, 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_frontier(
    axes: Axes, series: Mapping[str, Sequence[FrontierPoint]], title: str, height: str = "perplexity"
) -> None:
    """Perplexity against misses, one line for each way of choosing; lower left is better.

    height: the axis's label, where perplexities are given in other units.
    """
    labelled: list[tuple[FrontierPoint, str]] = []
    for number, (name, points) in enumerate(series.items()):
        ordered = sorted(points, key=lambda point: point.miss_rate)
        misses = [point.miss_rate for point in ordered]
        heights = [point.perplexity for point in ordered]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(misses, heights, color=colour, marker=marker, label=name)
        for point in ordered:
            if point.interval is not None:
                axes.vlines(point.miss_rate, *point.interval, color=colour, alpha=0.4)
        labelled += [(point, colour) for point in ordered]
    _label_points(axes, labelled)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("missed share of expert uses")
    axes.set_ylabel(height)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


LABEL_SIDES = (
    (0.0, 1.0),
    (0.0, -1.0),
    (1.0, 0.0),
    (-1.0, 0.0),
    (1.0, 1.0),
    (-1.0, 1.0),
    (1.0, -1.0),
    (-1.0, -1.0),
)
"""Where a point's label may stand, beginning with the best: above, below, right, left, and the corners."""
LABEL_SIZE = (0.115, 0.042)
"""Of the axes, with some room around it."""
TOUCH = 0.999
"""Things that only touch cover nothing of each other."""


def place_labels(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """On which side of its point each label stands, of LABEL_SIDES: the first on which it covers the fewest points and
    labels before it. points: in parts of the axes."""
    width, height = LABEL_SIZE
    taken: list[tuple[float, float]] = list(points)
    sides = []
    for x, y in points:

        def num_covered(side: tuple[float, float], x: float = x, y: float = y) -> int:
            left, low = x + side[0] * width, y + side[1] * height
            return sum(abs(left - a) < width * TOUCH and abs(low - b) < height * TOUCH for a, b in taken)

        side = min(LABEL_SIDES, key=num_covered)
        taken.append((x + side[0] * width, y + side[1] * height))
        sides.append(side)
    return sides


def _label_points(axes: Axes, labelled: Sequence[tuple[FrontierPoint, str]]) -> None:
    """Beside the points, once all of them are drawn and the axes have their limits."""
    axes.autoscale_view()
    places = [(point.miss_rate, point.perplexity) for point, _ in labelled]
    sides = place_labels([tuple(axes.transLimits.transform(place)) for place in places])
    for (point, colour), place, (right, up) in zip(labelled, places, sides, strict=True):
        axes.annotate(
            point.label,
            place,
            (5 * right, 4 * up),
            textcoords="offset points",
            fontsize="x-small",
            color=colour,
            ha={0.0: "center", 1.0: "left", -1.0: "right"}[right],
            va={0.0: "center", 1.0: "bottom", -1.0: "top"}[up],
        )
