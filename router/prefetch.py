"""Guesses the next layer's experts from the hidden state before that layer's attention, and hints them.

The gate of a layer sees what its attention adds; without it the guess is mostly right, since a layer changes the hidden
state little. A guess changes no result. Called by `router.backbone` where options ask for it.
Source: A. Eliseev and D. Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading", 2023,
"Speculative Expert Loading".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experts.directory import ExpertDirectory
from router.decoder_layer import LayerArithmetic
from router.weights import Layer


class Prefetcher:
    """Costs a layer one norm, one gate and one reading of a short list back from the tensors."""

    def __init__(
        self, layers: Sequence[Layer], arithmetic: LayerArithmetic, directory: ExpertDirectory
    ) -> None:
        self._layers, self._arithmetic, self._directory = layers, arithmetic, directory

    def hint(self, index: int, hidden_PD: Tensor, num_tokens: int) -> None:
        """After layer `index`: hidden_PD is what it put out, of which the first `num_tokens` rows are real."""
        following = self._layers[index + 1] if index + 1 < len(self._layers) else None
        if following is None or following.moe is None:
            return
        moe = following.moe
        gate = moe.gate(self._arithmetic.norm(hidden_PD, following.post_norm_D), num_tokens)
        experts = likely_experts(gate.logits_TE, gate.experts_per_token)
        self._directory.prefetch(moe.component, moe.layer, experts)


def likely_experts(logits_TE: Tensor, experts_per_token: int) -> list[int]:
    """All rows' K best experts, each once, by the sum of their probabilities over the rows that want them, falling."""
    weights_TK, experts_TK = torch.topk(torch.softmax(logits_TE.float(), dim=-1), experts_per_token)
    sums_E = torch.zeros(logits_TE.shape[1]).index_add_(0, experts_TK.flatten(), weights_TK.flatten())
    num_wanted = int((sums_E > 0).sum())
    order: list[int] = torch.sort(sums_E, descending=True, stable=True).indices[:num_wanted].tolist()
    return order
