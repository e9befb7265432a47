"""One decoder layer of a store, computed alone by the product's own code: `sage-moe compare`.

Nothing but that layer is read; its experts stay within a budget. Called by `gateway.stores.comparison`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experts.cores import num_cores, useful_threads
from experts.directory import LocalDirectory
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.manifest import Component
from router.decoder_layer import LayerArithmetic
from router.dispatch import Dispatch
from router.kv_cache import KvPool, blocks_for
from router.linears import prove_linears
from router.model_config import read_model_config
from router.scoring import Routing
from router.self_test import prove_row_invariance
from router.step_batch import Span, StepBatch
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner, StepRouting
from router.weights import TensorLoader, load_layer

DTYPE = torch.float32


@dataclass(frozen=True)
class LayerOutput:
    """What a layer made of T rows."""

    hidden_TD: Tensor
    """Float32, residual included."""
    experts_TK: Tensor | None
    """Of every row, best first; None in a dense layer."""
    logits_TE: Tensor | None
    """Of the gate, float32."""


class SingleLayers:
    """Computes any layer of one component of an open store, in float32."""

    def __init__(self, store: ExpertStore, component: Component) -> None:
        """Raises ConfigUnsupported or NotRowInvariant."""
        self.config = read_model_config(component.config)
        self._store, self._name = store, component.name
        torch.set_num_threads(useful_threads(num_cores(), self.config.expert_elements))
        # The head, by far the largest matrix, is not computed here.
        self._kernel = prove_row_invariance(replace(self.config, vocab_size=self.config.hidden_size), DTYPE)
        quantised = replace(store.quantised, head=None)
        self._forms = prove_linears(quantised, self.config, self._kernel, DTYPE)

    @torch.inference_mode()
    def compute(self, index: int, hidden_TD: Tensor, expert_budget_bytes: int) -> LayerOutput:
        """The layer's output for one text of T rows, positions 0 to T-1.

        expert_budget_bytes: of the experts that are in memory at a time. Raises BudgetTooSmall, WeightMismatch, or what
        reading the store raises.
        """
        config = self.config
        worker = ExpertWorker(
            self._store,
            self._kernel,
            DTYPE,
            widths={self._name: config.hidden_size},
            budget_bytes=expert_budget_bytes,
        )
        load = TensorLoader(self._store, self._name, DTYPE, self._kernel, self._forms)
        layer = load_layer(load, index, self._name, config, self._kernel, LocalDirectory(worker))
        # One layer in the cache: its own, at index 0.
        windowed = frozenset({0}) if config.window(index) is not None else frozenset[int]()
        alone = replace(config, num_layers=1, windowed_layers=windowed)
        notes = _Notes()
        batch = _one_text(len(hidden_TD), notes)
        arithmetic = LayerArithmetic(alone, self._kernel, DTYPE)
        pool = KvPool(alone, len(batch.spans[0].table) + 1, DTYPE)
        hidden_PD = arithmetic.pad(hidden_TD)
        step = arithmetic.prepare(batch)
        attended_PD = arithmetic.attention(0, layer, hidden_PD, step, pool)
        assert attended_PD is not None
        mixed_PD = arithmetic.feed_forward(layer, attended_PD, step)
        assert mixed_PD is not None
        return LayerOutput(mixed_PD[: len(hidden_TD)], notes.experts_TK, notes.logits_TE)


class _Notes(RoutingWatcher):
    """Keeps what the gate said and which experts were chosen."""

    def __init__(self) -> None:
        self.experts_TK: Tensor | None = None
        self.logits_TE: Tensor | None = None

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        self.experts_TK, self.logits_TE = routing.experts_TK, gate.logits_TE.float()


def _one_text(num_tokens: int, notes: _Notes) -> StepBatch:
    table = tuple(range(1, blocks_for(num_tokens) + 1))
    return StepBatch(
        spans=(Span(table, 0, num_tokens),),
        token_ids_T=torch.zeros(num_tokens, dtype=torch.int64),
        positions_3T=torch.arange(num_tokens).expand(3, -1),
        logit_rows=(),
        lengths_T=torch.full((num_tokens,), num_tokens),
        routing=StepRouting(watchers=(notes,)),
    )
