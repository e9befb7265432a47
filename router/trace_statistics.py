"""What a routing trace says about a model: how evenly experts are used, which go together, and what caches would do.

Pure functions over `router.trace_reader.RoutingTable`. Called by the evaluation's plots and `benchmarks/quality.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experts.eviction import Eviction, make_worth
from experts.replay import Trace, replay, replay_belady
from extraction.manifest import ExpertKey
from router.trace_reader import RoutingTable

UNTRUSTING: tuple[Eviction, ...] = ("lru", "lfu")
BELADY = "belady"
"""The optimum, which knows the future."""


def use_counts(table: RoutingTable) -> np.ndarray:
    """(L, E) int64: how many tokens each expert of each layer was given; zeros for layers without experts."""
    shape = (table.facts.num_layers, table.facts.num_experts)
    is_used_NK = table.experts_NK >= 0
    places_NK = table.layers_N.astype(np.int64)[:, None] * shape[1] + table.experts_NK
    counts: np.ndarray = np.bincount(places_NK[is_used_NK], minlength=shape[0] * shape[1]).reshape(shape)
    return counts


def moe_layers(table: RoutingTable) -> list[int]:
    """Layers that have rows, ascending."""
    return [int(layer) for layer in np.unique(table.layers_N)]


def use_entropy(counts_LE: np.ndarray) -> np.ndarray:
    """(L,) entropy of each layer's use as a share of the largest possible: 1 is even use, 0 a single expert. A router
    that collapsed shows as a low value."""
    shares_LE = counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)
    logs_LE = np.log(shares_LE, out=np.zeros_like(shares_LE), where=shares_LE > 0)
    entropy_L: np.ndarray = -(shares_LE * logs_LE).sum(axis=1) / max(np.log(counts_LE.shape[1]), 1e-9)
    return entropy_L


def busier_half(counts_LE: np.ndarray) -> np.ndarray:
    """(L,) share of all uses that the busier half of a layer's experts takes: 0.5 is even use."""
    ordered_LE = np.sort(counts_LE, axis=1)[:, ::-1]
    half = counts_LE.shape[1] // 2
    share_L: np.ndarray = ordered_LE[:, :half].sum(axis=1) / np.maximum(counts_LE.sum(axis=1), 1)
    return share_L


def joint_counts(table: RoutingTable, layer: int) -> np.ndarray:
    """(E, E) float64: how many tokens two experts of a layer both served; on the diagonal, each one's own."""
    experts_NK = table.experts_NK[table.layers_N == layer]
    num_tokens, num_experts = len(experts_NK), table.facts.num_experts
    together_EE = np.zeros((num_experts, num_experts))
    for first in range(0, num_tokens, 1 << 14):  # bounds the (tokens, E) matrix
        piece_NK = experts_NK[first : first + (1 << 14)]
        chosen_NE = np.zeros((len(piece_NK), num_experts + 1), dtype=np.float32)
        np.put_along_axis(chosen_NE, piece_NK.astype(np.int64), 1.0, axis=1)  # -1 lands in the last column
        chosen_NE = chosen_NE[:, :num_experts]
        together_EE += chosen_NE.T @ chosen_NE
    return together_EE


def coactivation(table: RoutingTable, layer: int) -> np.ndarray:
    """(E, E) float64: how many times as often two experts of a layer serve the same token as if experts were drawn
    by their use alone; NaN on the diagonal and for experts that were never used."""
    together_EE = joint_counts(table, layer)
    num_tokens = int((table.layers_N == layer).sum())
    uses_E = np.diag(together_EE).copy()
    # Of a token's k experts, k - 1 are left for the others.
    mean_k = uses_E.sum() / max(num_tokens, 1)
    expected_EE = np.outer(uses_E, uses_E) / max(num_tokens, 1) * (mean_k - 1) / max(mean_k, 1e-9)
    ratio_EE = np.full_like(together_EE, np.nan)
    np.divide(together_EE, expected_EE, out=ratio_EE, where=expected_EE > 0)
    np.fill_diagonal(ratio_EE, np.nan)
    return ratio_EE


def decode_calls(table: RoutingTable, max_tokens: int) -> tuple[Trace, list[float]]:
    """What experts each layer needs for each token, request by request and token by token as one stream would decode
    them, and the number of the token; the first `max_tokens` tokens. A token computed again counts once."""
    order_N = np.lexsort((table.layers_N, table.positions_N, table.requests_N))
    rows = np.stack((table.requests_N, table.positions_N, table.layers_N), axis=1)[order_N]
    is_new_N = np.ones(len(rows), dtype=bool)
    is_new_N[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    order_N, rows = order_N[is_new_N], rows[is_new_N]
    is_next_N = np.zeros(len(rows), dtype=bool)
    is_next_N[1:] = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
    tokens_N = np.cumsum(is_next_N)
    num_rows = int(np.searchsorted(tokens_N, max_tokens))
    component = table.facts.component
    calls = [
        [ExpertKey(component, layer, expert) for expert in chosen if expert >= 0]
        for layer, chosen in zip(
            rows[:num_rows, 2].tolist(), table.experts_NK[order_N[:num_rows]].tolist(), strict=True
        )
    ]
    return calls, [float(token) for token in tokens_N[:num_rows]]


@dataclass(frozen=True)
class MissCurve:
    """Misses of one eviction at several sizes of a cache that all layers share, from a cold start."""

    eviction: str
    miss_rates: tuple[float, ...]


def miss_curves(table: RoutingTable, shares: Sequence[float], max_tokens: int) -> list[MissCurve]:
    """One curve for each eviction and one for Belady's optimum. shares: of all experts, what the cache holds.

    Evictions that need trust are left out: a trace knows none. Costs some microseconds for each use, size and eviction.
    """
    calls, steps = decode_calls(table, max_tokens)
    num_experts = table.facts.num_experts * len(moe_layers(table))
    capacities = [max(1, round(share * num_experts)) for share in shares]
    curves = []
    for eviction in UNTRUSTING:
        counts = [replay(calls, steps, capacity, make_worth(eviction)) for capacity in capacities]
        curves.append(MissCurve(eviction, tuple(1.0 - count.hit_rate for count in counts)))
    best = [replay_belady(calls, capacity) for capacity in capacities]
    return [*curves, MissCurve(BELADY, tuple(1.0 - count.hit_rate for count in best))]
