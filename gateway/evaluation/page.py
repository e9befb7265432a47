"""One page about one evaluation: use of experts by text, entropy, co-activation, and misses by size of the cache.

Called by `gateway.evaluation.command`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gateway.evaluation.plots import (
    draw_coactivation,
    draw_layers,
    draw_miss_curves,
    draw_use,
    new_figure,
    to_png,
)
from gateway.evaluation.routing import by_text, select
from gateway.evaluation.run import Evaluation
from router.trace_reader import RoutingTable, read_trace
from router.trace_statistics import coactivation, miss_curves, moe_layers, use_counts, use_entropy

MISS_SHARES = (0.05, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
MISS_TOKENS = 1024
"""Tokens whose misses are simulated: enough to see the shape, in seconds."""
MAX_SHOWN_TEXTS = 4


def draw_page(evaluation: Evaluation, trace: Path) -> bytes:
    """A PNG. trace: of this evaluation. Raises TraceInvalid."""
    table = by_text(read_trace(trace), evaluation.windows)
    tables = [select(table, table.requests_N == number) for number in range(len(table.names))]
    counts = {name: use_counts(part) for name, part in zip(table.names, tables, strict=True)}
    shown = list(counts)[:MAX_SHOWN_TEXTS]
    layers = moe_layers(table)
    num_rows = len(shown) + 2
    figure = new_figure(11.0, 1.9 * len(shown) + 8.6)
    grid = figure.add_gridspec(num_rows, 2, height_ratios=[1.9] * len(shown) + [3.2, 5.0])
    for row, name in enumerate(shown):
        axes = figure.add_subplot(grid[row, :])
        draw_use(axes, counts[name], layers, f"Use of experts: {name}")
    entropies = {name: use_entropy(counts[name])[layers] for name in shown}
    axes = figure.add_subplot(grid[-2, 0])
    draw_layers(
        axes, layers, entropies, "Evenness of use (1 = every expert alike)", "entropy / largest possible"
    )
    shares = list(MISS_SHARES)
    axes = figure.add_subplot(grid[-2, 1])
    num_tokens = min(MISS_TOKENS, sum(len(score.text.ids) for score in evaluation.texts))
    curves = miss_curves(table, shares, MISS_TOKENS)
    draw_miss_curves(axes, shares, curves, f"Misses, token by token, first {num_tokens:,} tokens, cold start")
    for column, layer in enumerate(_telling_layers(table, layers)):
        axes = figure.add_subplot(grid[-1, column])
        draw_coactivation(axes, coactivation(table, layer), f"Experts chosen together, layer {layer}")
    report = f"{evaluation.options.study.policy} routing, {evaluation.dtype}"
    many = len(evaluation.texts)
    figure.suptitle(f"Routing of {'1 text' if many == 1 else f'{many} texts'}, {report}")
    return to_png(figure)


def _telling_layers(table: RoutingTable, layers: Sequence[int]) -> list[int]:
    """The layers of least and most even use."""
    entropy_L = use_entropy(use_counts(table))[list(layers)]
    return list(dict.fromkeys((layers[int(np.argmin(entropy_L))], layers[int(np.argmax(entropy_L))])))
