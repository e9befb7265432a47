"""One layer's mixture of experts: gate, scoring, dispatch, experts, combine. Called by `router.backbone`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from experts.directory import ExpertDirectory
from experts.numerics import RowKernel
from router.dispatch import combine, dispatch
from router.model_config import ModelConfig
from router.scoring import Routing, route_native
from router.shared_expert import SharedExpert


@dataclass(frozen=True)
class MoeBlock:
    """The gate of one layer and the way to its experts."""

    component: str
    layer: int
    gate_ED: Tensor
    config: ModelConfig
    kernel: RowKernel
    directory: ExpertDirectory
    shared: SharedExpert | None = None
    """The expert that every token passes."""

    @property
    def nbytes(self) -> int:
        """Resident bytes of what is computed here."""
        return self.gate_ED.nbytes + (self.shared.nbytes if self.shared is not None else 0)

    def route(self, hidden_PD: Tensor, num_tokens: int) -> Routing:
        """Choose experts for the first `num_tokens` rows; the rest is padding."""
        logits_TE = self.kernel.linear(hidden_PD, self.gate_ED)[:num_tokens]
        return route_native(logits_TE, self.config.experts_per_token, self.config.normalise_top_k)

    def forward(self, hidden_PD: Tensor, num_tokens: int, trace: str = "") -> Tensor:
        """(P, D) normalised rows, of which the first `num_tokens` are real -> (num_tokens, D) float32."""
        routing = self.route(hidden_PD, num_tokens)
        dispatched = dispatch(self.component, self.layer, hidden_PD[:num_tokens], routing, trace)
        routed_TD = combine(dispatched, self.directory.run(dispatched.call))
        if self.shared is None:
            return routed_TD
        return routed_TD + self.shared.forward(hidden_PD, num_tokens)
