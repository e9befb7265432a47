"""What the snarc policy knows of a layer's experts: their own novelty, their trust, and which are resident.

Facts of the service, not of a request: they change with all the traffic. Asked by `router.steering` once a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from router.scoring import ExpertFacts, Routing

USE_HALF_LIFE_TOKENS = 256
"""After so many tokens a use counts half."""
UNSEEN_TRUST = 0.5

ResidentSource = Callable[[str, int], frozenset[int]]
"""(component, layer) -> numbers of the experts that are in memory."""
TrustSource = Callable[[str, int], Tensor]
"""(component, layer) -> (E,) float32 trust in [0, 1]."""


def unseen_trust(num_experts: int) -> TrustSource:
    """The trust of experts of which nothing is known."""
    trust_E = torch.full((num_experts,), UNSEEN_TRUST)
    return lambda component, layer: trust_E


@dataclass
class _Warmth:
    resident: frozenset[int]
    warmth_E: Tensor


class FactSource:
    """Gathers facts for one component. Not safe for several threads."""

    def __init__(
        self,
        component: str,
        num_experts: int,
        resident: ResidentSource,
        trust: TrustSource | None = None,
    ) -> None:
        self._component, self._num_experts = component, num_experts
        self._resident, self._trust = resident, trust or unseen_trust(num_experts)
        self._warmth: dict[int, _Warmth] = {}
        self._use: dict[int, Tensor] = {}

    def warmth(self, layer: int) -> Tensor:
        """(E,) 1 for resident experts, else 0."""
        resident = self._resident(self._component, layer)
        known = self._warmth.get(layer)
        if known is None or known.resident != resident:
            warmth_E = torch.zeros(self._num_experts)
            warmth_E[list(resident)] = 1.0
            known = self._warmth[layer] = _Warmth(resident, warmth_E)
        return known.warmth_E

    def facts(self, layer: int, warmth_E: Tensor) -> ExpertFacts:
        return ExpertFacts(self._novelty(layer), self._trust(self._component, layer), warmth_E)

    def count_use(self, layer: int, routing: Routing) -> None:
        """Take note of what a step's tokens chose in a layer."""
        use_E = self._use_of(layer)
        num_tokens = routing.experts_TK.shape[0]
        chosen = routing.experts_TK.reshape(-1)
        counts_E = torch.bincount(
            chosen[chosen >= 0] if routing.has_absent else chosen, minlength=self._num_experts
        )
        use_E.mul_(0.5 ** (num_tokens / USE_HALF_LIFE_TOKENS)).add_(counts_E)

    def _novelty(self, layer: int) -> Tensor:
        """(E,) m / (m + use), m the mean use: 1 for an expert without recent use, 1/2 for one of even share."""
        use_E = self._use_of(layer)
        mean = use_E.mean()
        return (mean + 1e-6) / (mean + use_E + 1e-6)

    def _use_of(self, layer: int) -> Tensor:
        use_E = self._use.get(layer)
        if use_E is None:
            use_E = self._use[layer] = torch.zeros(self._num_experts)
        return use_E
