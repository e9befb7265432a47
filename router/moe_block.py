"""One layer's mixture of experts: gate, scoring, dispatch, experts, combine. Called by `router.backbone`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from experts.directory import ExpertDirectory
from experts.expert_table import ExpertTable
from experts.numerics import RowKernel
from router.dispatch import combine, dispatch
from router.model_config import ModelConfig
from router.shared_expert import SharedExpert
from router.step_routing import NATIVE, GateOutput, StepRouting


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

    def gate(self, hidden_PD: Tensor, num_tokens: int) -> GateOutput:
        """What the gate says about the first `num_tokens` rows; the rest is padding."""
        logits_TE = self.kernel.linear(hidden_PD, self.gate_ED)[:num_tokens]
        if not self.kernel.is_on_cpu:
            logits_TE = logits_TE.cpu()  # the one reading back of a layer: routing is decided on the host
        config = self.config
        return GateOutput(
            self.layer,
            hidden_PD[:num_tokens],
            logits_TE,
            config.experts_per_token,
            config.normalise_top_k,
            self.kernel.level or None,
        )

    def table(self) -> ExpertTable | None:
        """All experts of the layer, where they stay in this process; see `ExpertDirectory.table`."""
        return self.directory.table(self.component, self.layer)

    def note_use(self, table: ExpertTable, used: Sequence[int], num_tokens: int) -> None:
        """Tokens were sent to their own experts without `forward`. used: numbers of these experts."""
        self.directory.note_use(table, used, num_tokens * self.config.experts_per_token)

    def forward(
        self, hidden_PD: Tensor, num_tokens: int, steering: StepRouting = NATIVE, trace: str = ""
    ) -> Tensor:
        """(P, D) normalised rows, of which the first `num_tokens` are real -> (num_tokens, D) float32."""
        gate = self.gate(hidden_PD, num_tokens)
        routing = steering.route(gate)
        dispatched = dispatch(self.component, self.layer, gate.hidden_TD, routing, trace)
        rows_RD = self.directory.run(dispatched.call)
        steering.watch(gate, routing, dispatched, rows_RD)
        routed_TD = combine(dispatched, rows_RD)
        if routing.stand_ins is not None:
            rows_N, output_ND = routing.stand_ins
            device = self.kernel.device
            routed_TD = routed_TD.index_add(0, rows_N.to(device), output_ND.to(device))
        if self.shared is None:
            return routed_TD
        return routed_TD + self.shared.forward(hidden_PD, num_tokens)
