"""From gate logits to the experts of each token. Pure functions; called by `router.moe_block`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The experts of T tokens, best first."""

    experts_TK: Tensor
    """int64."""
    weights_TK: Tensor
    """float32 mixing weights."""


def route_native(gate_logits_TE: Tensor, experts_per_token: int, normalise: bool) -> Routing:
    """The checkpoint's own routing: softmax over all experts in float32, then top-k.

    normalise: make the chosen weights sum to 1 (`norm_topk_prob`). Logits may be of any float dtype.
    """
    probabilities_TE = torch.softmax(gate_logits_TE.float(), dim=-1)
    weights_TK, experts_TK = torch.topk(probabilities_TE, experts_per_token, dim=-1)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(experts_TK, weights_TK)
