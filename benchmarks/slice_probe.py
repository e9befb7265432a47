"""Runs a slice on a walk through its topics and measures how each layer routes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.one_sequence import OneSequence
from benchmarks.slice_routing import HiddenShape, RoutingFacts, measure, token_walk
from experts.store import ExpertStore
from router.dispatch import Dispatch
from router.loading import EngineOptions, load_engine
from router.scoring import Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner, StepRouting

CHUNK = 128
"""Tokens of one step: enough to use an expert's weights several times, few enough to take little memory."""
EXPERT_BUDGET_BYTES = 2_000_000_000


class RoutingLog(RoutingWatcher):
    """Keeps the experts of every token, by layer."""

    def __init__(self) -> None:
        self.experts: dict[int, list[Tensor]] = {}

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        self.experts.setdefault(gate.layer, []).append(routing.experts_TK.clone())


def probe_routing(store_root: Path, num_tokens: int) -> dict[int, RoutingFacts]:
    """Facts of each layer with experts."""
    store = ExpertStore.open(store_root)
    options = EngineOptions(kv_budget_bytes=1 << 26, expert_budget_bytes=EXPERT_BUDGET_BYTES)
    loaded = load_engine(store, options)
    try:
        config = loaded.config
        generator = torch.Generator().manual_seed(1)
        topics = HiddenShape(config.hidden_size).num_topics
        ids = token_walk(num_tokens, config.vocab_size, topics, generator)
        log = RoutingLog()
        text = OneSequence(loaded.engine.backbone, num_tokens)
        for chunk in torch.split(ids, CHUNK):
            text.step(chunk, StepRouting(watchers=(log,)))
    finally:
        loaded.close()
    return {layer: measure(torch.cat(parts), config.num_experts) for layer, parts in log.experts.items()}
