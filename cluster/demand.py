"""How often each expert is expected to be used, and with which others: what placement balances. Plain values.

Uniform where nothing is known; otherwise from a routing trace (`router.trace_statistics.use_counts`) or from the trust
ledger, whose efficiency weights are decayed counts of use. Read by `cluster.placement` and `cluster.forecast`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from experts.trust import EFFICIENCY, TrustTable
from extraction.manifest import ExpertKey

Floats = npt.NDArray[np.float64]
PRIOR_TOKENS = 256.0
"""Tokens of even routing that counts are mixed with, so that what was not used yet is not expected never to be."""


@dataclass(frozen=True)
class Demand:
    """One model's experts."""

    sizes: Mapping[ExpertKey, int]
    """Bytes of every expert in memory."""
    uses: Mapping[ExpertKey, float]
    """Expected activations per token, of every key of `sizes`; a layer's add up to its experts per token."""
    row_bytes: int
    """Of one token's activations on the wire."""
    together: Mapping[tuple[ExpertKey, ExpertKey], float] = field(default_factory=dict)
    """Expected activations per token of two experts of a layer at once; each pair once, those left out are 0."""

    def __post_init__(self) -> None:
        if self.sizes.keys() != self.uses.keys():
            raise ValueError("sizes and uses are of other experts")
        if any(num_bytes < 1 for num_bytes in self.sizes.values()):
            raise ValueError("an expert has no bytes")
        if any(not 0.0 <= use < float("inf") for use in self.uses.values()):
            raise ValueError("uses must be finite and not negative")

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def largest_bytes(self) -> int:
        return max(self.sizes.values(), default=0)


def uniform_demand(sizes: Mapping[ExpertKey, int], experts_per_token: int, row_bytes: int) -> Demand:
    """Every expert of a layer is as likely as any other."""
    counts: dict[tuple[str, int], int] = {}
    for key in sizes:
        counts[key[:2]] = counts.get(key[:2], 0) + 1
    uses = {key: min(1.0, experts_per_token / counts[key[:2]]) for key in sizes}
    return Demand(sizes, uses, row_bytes)


def counted_demand(
    sizes: Mapping[ExpertKey, int],
    counts: Mapping[ExpertKey, float],
    experts_per_token: int,
    row_bytes: int,
    together: Mapping[tuple[ExpertKey, ExpertKey], float] | None = None,
) -> Demand:
    """From counts of use, of any scale and decay, mixed with PRIOR_TOKENS of even routing; absent counts are 0.

    together: counts of pairs on the same scale.
    """
    layers: dict[tuple[str, int], list[ExpertKey]] = {}
    for key in sizes:
        layers.setdefault(key[:2], []).append(key)
    uses: dict[ExpertKey, float] = {}
    tokens: dict[tuple[str, int], float] = {}
    for name, keys in layers.items():
        num_tokens = sum(counts.get(key, 0.0) for key in keys) / experts_per_token
        tokens[name] = num_tokens + PRIOR_TOKENS
        even = min(1.0, experts_per_token / len(keys))
        for key in keys:
            uses[key] = (counts.get(key, 0.0) + PRIOR_TOKENS * even) / tokens[name]
    pairs = {pair: count / tokens[pair[0][:2]] for pair, count in (together or {}).items()}
    return Demand(sizes, uses, row_bytes, pairs)


def trust_counts(table: TrustTable) -> dict[ExpertKey, float]:
    """Decayed counts of use from the trust ledger: an expert's efficiency is observed once for every row."""
    return layer_counts(table.weights_ALE[EFFICIENCY], table.component, table.layers)


def layer_counts(
    counts_LE: npt.NDArray[Any], component: str, layers: tuple[int, ...] | None = None
) -> dict[ExpertKey, float]:
    """Counts by key. layers: of the rows; None means that row l is layer l, as in a trace's statistics."""
    rows = range(len(counts_LE)) if layers is None else layers
    return {
        ExpertKey(component, layer, expert): float(count)
        for layer, counts_E in zip(rows, counts_LE.tolist(), strict=True)
        for expert, count in enumerate(counts_E)
    }
