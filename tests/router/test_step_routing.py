"""A step's policy decides, its watchers see what was decided and answered, and both know whose rows they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from router.dispatch import Dispatch
from router.loading import EngineOptions
from router.request import GenerationRequest, SamplingParams
from router.scoring import Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner
from tests.engines import open_engine, run_to_end


class _Notes(RoutingWatcher):
    """A policy and a watcher: routes everyone to expert 0 with weight 1, and notes whose rows it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[tuple[str, int, int], ...], int]] = []

    def is_native(self, owners: Sequence[SpanOwner]) -> bool:
        return False

    def route(self, owners: Sequence[SpanOwner], gate: GateOutput) -> Routing:
        num_tokens = gate.logits_TE.shape[0]
        assert sum(owner.count for owner in owners) == num_tokens
        return Routing(torch.zeros(num_tokens, 1, dtype=torch.int64), torch.ones(num_tokens, 1))

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        assert dispatched.call.experts == (0,) and rows_RD.shape == gate.hidden_TD.shape
        spans = tuple((owner.request.request_id, owner.first, owner.count) for owner in owners)
        self.seen.append((gate.layer, spans, routing.experts_TK.shape[1]))


def test_policy_decides_and_watcher_sees_every_layer(tiny_store: Path) -> None:
    requests = [
        GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=2, temperature=0.0)),
        GenerationRequest("b", (4, 5), SamplingParams(max_tokens=2, temperature=0.0)),
    ]
    loaded = open_engine(tiny_store, EngineOptions())
    notes = _Notes()
    loaded.engine.watchers = (notes,)
    loaded.engine.policy = notes
    run_to_end(loaded.engine, requests)
    moe_layers = sorted(loaded.config.moe_layers)
    assert [layer for layer, _, _ in notes.seen] == moe_layers * 2
    assert {spans for _, spans, _ in notes.seen} == {
        (("a", 0, 3), ("b", 0, 2)),
        (("a", 3, 1), ("b", 2, 1)),
    }
    assert loaded.worker.stats.experts_used == {
        key for key in loaded.worker.stats.experts_used if key.expert == 0
    }
    loaded.close()
