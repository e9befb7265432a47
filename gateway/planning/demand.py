"""What experts are expected to be used: from a routing trace of the same model, or from what trust was learned from.

Called by `gateway.planning.command` and `gateway.service.placing`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.demand import Demand, counted_demand, layer_counts, trust_counts
from cluster.model_sizes import ModelSizes
from experts.trust_ledger import TrustIdentity, read_ledger
from extraction.manifest import ExpertKey
from router.errors import TraceInvalid
from router.trace_reader import RoutingTable, read_trace
from router.trace_statistics import joint_counts, moe_layers, use_counts

LEAST_RATIO = 1.5
"""Two experts count as firing together when they do so this many times as often as their uses alone would have it."""
MOST_PARTNERS = 8
"""Of each expert; its most frequent ones. Keeps the pairs sparse."""


def traced_demand(path: Path, model: ModelSizes) -> Demand:
    """Raises TraceInvalid, also for a trace of another model."""
    table = read_trace(path)
    config, facts = model.config, table.facts
    ours = (model.component, config.num_layers, config.num_experts, config.experts_per_token)
    if ours != (facts.component, facts.num_layers, facts.num_experts, facts.experts_per_token):
        theirs = (
            f"{facts.num_layers} layers of {facts.num_experts} experts, {facts.experts_per_token} a token"
        )
        raise TraceInvalid(str(path), f"is of another model: component {facts.component}, {theirs}")
    counts = layer_counts(use_counts(table), model.component)
    sizes = model.expert_sizes()
    return counted_demand(
        sizes,
        {key: counts[key] for key in sizes},
        config.experts_per_token,
        model.row_bytes,
        _pairs(table, model.component),
    )


def learned_demand(path: Path, identity: TrustIdentity, model: ModelSizes) -> Demand | None:
    """From the uses that a trust ledger has observed; None where it has none. Raises LedgerUnusable."""
    table = read_ledger(path, identity)
    if not table.num_tokens:
        return None
    counts = trust_counts(table)
    sizes = model.expert_sizes()
    known = {key: counts.get(key, 0.0) for key in sizes}
    return counted_demand(sizes, known, model.config.experts_per_token, model.row_bytes)


def _pairs(table: RoutingTable, component: str) -> dict[tuple[ExpertKey, ExpertKey], float]:
    pairs: dict[tuple[ExpertKey, ExpertKey], float] = {}
    for layer in moe_layers(table):
        together_EE = joint_counts(table, layer)
        uses_E = np.diag(together_EE).copy()
        np.fill_diagonal(together_EE, 0.0)
        expected_EE = np.outer(uses_E, uses_E) / max(1.0, float((table.layers_N == layer).sum()))
        together_EE[together_EE < LEAST_RATIO * expected_EE] = 0.0
        partners_EP = np.argsort(-together_EE, axis=1, kind="stable")[:, :MOST_PARTNERS]
        for expert, partners_P in enumerate(partners_EP.tolist()):
            for other in partners_P:
                count = float(together_EE[expert, other])
                if count > 0:
                    first, second = sorted((expert, other))
                    pairs[ExpertKey(component, layer, first), ExpertKey(component, layer, second)] = count
    return pairs
