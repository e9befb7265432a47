"""The routing of whole texts, put together from the trace of their windows. Pure; called by `gateway.evaluation.page`
and `benchmarks/quality.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gateway.evaluation.run import window_name
from gateway.evaluation.windows import Window
from router.trace_reader import RoutingTable


def by_text(table: RoutingTable, texts: Mapping[str, Sequence[Window]]) -> RoutingTable:
    """The same rows with texts as requests and positions in the text; of tokens that several windows compute, the row
    of the window that scores them. texts: all that were traced, in order, with their windows."""
    first, keep_from, number = {}, {}, {}
    for index, windows in enumerate(texts.values()):
        for window in windows:
            name = window_name(index, window)
            first[name], number[name] = window.first, index
            keep_from[name] = 0 if window == windows[0] else window.scored_first
    firsts = np.array([first[name] for name in table.names], dtype=np.int32)[table.requests_N]
    starts = np.array([keep_from[name] for name in table.names], dtype=np.int32)[table.requests_N]
    numbers = np.array([number[name] for name in table.names], dtype=np.int32)[table.requests_N]
    positions_N = table.positions_N + firsts
    kept_N = positions_N >= starts
    return replace(
        select(table, kept_N),
        names=tuple(texts),
        requests_N=numbers[kept_N],
        positions_N=positions_N[kept_N],
    )


def select(table: RoutingTable, kept_N: np.ndarray) -> RoutingTable:
    """Some of the rows; names stay."""
    return replace(
        table,
        requests_N=table.requests_N[kept_N],
        positions_N=table.positions_N[kept_N],
        layers_N=table.layers_N[kept_N],
        experts_NK=table.experts_NK[kept_N],
        weights_NK=table.weights_NK[kept_N],
        tokens_N=None if table.tokens_N is None else table.tokens_N[kept_N],
    )
