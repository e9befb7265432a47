"""Steps of one sequence through a backbone, with given tokens: what every contender computes for the same text."""

from __future__ import annotations

import torch
from torch import Tensor

from router.backbone import Backbone
from router.kv_cache import KvPool, blocks_for
from router.step_batch import Span, StepBatch, StepOutput
from router.step_routing import NATIVE, StepRouting


class OneSequence:
    """A cache for one text of a known length, and how far it was computed."""

    def __init__(self, backbone: Backbone, max_tokens: int) -> None:
        self.backbone = backbone
        num_blocks = blocks_for(max_tokens)
        self.pool = KvPool(backbone.config, num_blocks + 1, backbone.dtype)
        self._table = tuple(range(1, num_blocks + 1))
        self._computed = 0

    def step(self, ids_T: Tensor, routing: StepRouting = NATIVE) -> StepOutput:
        """Compute the next T tokens, up to the last layer: no logits, the last row's hidden state is handed out."""
        count = len(ids_T)
        span = Span(self._table, self._computed, count)
        positions = torch.arange(self._computed, self._computed + count).expand(3, -1)
        batch = StepBatch((span,), ids_T, positions, (), scored_rows=(count - 1,), routing=routing)
        output = self.backbone.forward(batch, self.pool)
        self._computed += count
        return output
