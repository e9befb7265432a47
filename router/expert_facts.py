"""What the snarc policy knows of a layer's experts: their own novelty, their trust, and which are resident.

Facts of the service, not of a request: they change with all the traffic. Asked by `router.steering` once a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from router.scoring import ExpertFacts, Routing

USE_HALF_LIFE_TOKENS = 256
"""After so many tokens a use counts half."""
REFRESH_TOKENS = 32
"""Uses are counted, and novelty follows, after about so many tokens: each time costs several operations."""
UNSEEN_TRUST = 0.5

ResidentSource = Callable[[str, int], frozenset[int]]
"""(component, layer) -> numbers of the experts that are in memory."""
TrustSource = Callable[[str, int], Tensor]
"""(component, layer) -> (E,) float32 trust in [0, 1]."""


def unseen_trust(num_experts: int) -> TrustSource:
    """The trust of experts of which nothing is known."""
    trust_E = torch.full((num_experts,), UNSEEN_TRUST)
    return lambda component, layer: trust_E


class Residents(NamedTuple):
    """Which of a layer's E experts are in memory."""

    experts: frozenset[int]
    warmth_E: Tensor
    """float32: 1 for those that are, else 0."""
    cold_E: Tensor
    """bool: those that are not."""

    @classmethod
    def of(cls, experts: frozenset[int], num_experts: int) -> Residents:
        is_cold = bytearray(b"\1" * num_experts)
        for expert in experts:
            is_cold[expert] = 0
        cold_E = torch.frombuffer(is_cold, dtype=torch.bool)
        return cls(experts, (~cold_E).float(), cold_E)


@dataclass
class _Use:
    """Of one layer: decayed counts, what was chosen since, and the novelty that follows from the counts."""

    counts_E: Tensor
    novelty_E: Tensor
    chosen: list[Tensor] = field(default_factory=list)
    num_tokens: int = 0


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
        self._residents: dict[int, Residents] = {}
        self._use: dict[int, _Use] = {}

    def residents(self, layer: int) -> Residents:
        """At this moment."""
        experts = self._resident(self._component, layer)
        known = self._residents.get(layer)
        if known is None or known.experts != experts:
            known = self._residents[layer] = Residents.of(experts, self._num_experts)
        return known

    def facts(self, layer: int, warmth_E: Tensor) -> ExpertFacts:
        return ExpertFacts(self._use_of(layer).novelty_E, self._trust(self._component, layer), warmth_E)

    def count_use(self, layer: int, routing: Routing) -> None:
        """Take note of what a step's tokens chose in a layer.

        Novelty is m / (m + use), m the mean use: 1 for an expert without recent use, 1/2 for one of even share.
        """
        use = self._use_of(layer)
        use.chosen.append(routing.experts_TK.reshape(-1))
        use.num_tokens += routing.experts_TK.shape[0]
        if use.num_tokens < REFRESH_TOKENS:
            return
        chosen = torch.cat(use.chosen)
        counts_E = torch.bincount(chosen[chosen >= 0], minlength=self._num_experts)
        use.counts_E.mul_(0.5 ** (use.num_tokens / USE_HALF_LIFE_TOKENS)).add_(counts_E)
        mean = use.counts_E.mean()
        use.novelty_E = mean / (mean + use.counts_E)
        use.chosen, use.num_tokens = [], 0

    def _use_of(self, layer: int) -> _Use:
        use = self._use.get(layer)
        if use is None:
            use = _Use(torch.zeros(self._num_experts), torch.ones(self._num_experts))
            self._use[layer] = use
        return use
