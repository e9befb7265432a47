"""Experts that are never chosen: `--mask-experts`, to see what a model loses without them.

The gate's probabilities stay those over all experts; the best of the others are chosen, and their weights sum to 1
where the checkpoint's do. A token whose own experts are all allowed keeps its routing bit for bit. Called by the
engine as a `RoutingPolicy`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from router.errors import MaskInvalid
from router.model_config import ModelConfig
from router.scoring import Routing
from router.step_routing import GateOutput, SpanOwner

_PART = re.compile(r"([0-9]{1,6}):([0-9]{1,6})(?:-([0-9]{1,6}))?")
MAX_EXPERT = 1 << 15


def parse_mask(text: str) -> dict[int, frozenset[int]]:
    """`L:E` and `L:E-E` (both ends included), separated by commas -> layer -> experts. Raises MaskInvalid."""
    masked: dict[int, set[int]] = {}
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise MaskInvalid(part, "write LAYER:EXPERT or LAYER:FIRST-LAST, separated by commas")
        layer, first = int(match[1]), int(match[2])
        last = int(match[3]) if match[3] else first
        if not first <= last < MAX_EXPERT:
            raise MaskInvalid(part, f"must rise, and stay below {MAX_EXPERT}")
        masked.setdefault(layer, set()).update(range(first, last + 1))
    return {layer: frozenset(experts) for layer, experts in masked.items()}


class MaskPolicy:
    """A `RoutingPolicy` that is native but for the masked experts."""

    def __init__(self, masked: Mapping[int, frozenset[int]], config: ModelConfig) -> None:
        """Raises MaskInvalid for what the model does not have, or where fewer experts remain than a token needs."""
        self._allowed: dict[int, Tensor] = {}
        for layer, experts in masked.items():
            if layer not in config.moe_layers:
                raise MaskInvalid(f"{layer}:...", f"layer {layer} has no experts in this model")
            beyond = max(experts)
            if beyond >= config.num_experts:
                raise MaskInvalid(
                    f"{layer}:{beyond}", f"a layer has {config.num_experts} experts, counted from 0"
                )
            remaining = config.num_experts - len(experts)
            if remaining < config.experts_per_token:
                reason = (
                    f"{remaining} experts remain in layer {layer}, a token needs {config.experts_per_token}"
                )
                raise MaskInvalid(f"{layer}:...", reason)
            allowed_E = torch.ones(config.num_experts, dtype=torch.bool)
            allowed_E[sorted(experts)] = False
            self._allowed[layer] = allowed_E

    def is_native(self, owners: Sequence[SpanOwner]) -> bool:
        """See RoutingPolicy."""
        return False

    def route(self, owners: Sequence[SpanOwner], gate: GateOutput) -> Routing:
        allowed_E = self._allowed.get(gate.layer)
        native = gate.native()
        if allowed_E is None:
            return native
        probabilities_TE = torch.softmax(gate.logits_TE.float(), dim=-1)
        ranked_TE = torch.where(allowed_E.to(probabilities_TE.device), probabilities_TE, -1.0)
        weights_TK, experts_TK = torch.topk(ranked_TE, gate.experts_per_token, dim=-1)
        if gate.normalise:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        is_allowed_T1 = allowed_E[native.experts_TK].all(dim=-1, keepdim=True)
        return Routing(
            torch.where(is_allowed_T1, native.experts_TK, experts_TK),
            torch.where(is_allowed_T1, native.weights_TK, weights_TK),
        )
