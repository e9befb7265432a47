"""Stand-ins: an expert's mean output in place of the expert, where it is not resident and hardly weighs.

Reading an expert for a token to which it contributes a few percent is what a small budget spends most of its time on.
Dropping it costs quality; what it says on average, learned from the traffic, costs one vector in memory and recovers
most of that. Only for requests whose routing is not native, and named in their answers. Asked by `router.choosing`;
`OutputMeans` watches what experts answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.dispatch import Dispatch
from router.scoring import ABSENT, Routing, StandIns
from router.step_routing import GateOutput, SpanOwner

MIN_USES = 64
"""Of an expert, before its mean stands in for it."""
LAYER_EXPONENT = 0.5
"""How far an expert's size counts a layer that adds little as such: 0 compares experts with their own layer only, 1
with the whole model. Between the two cost least on the bundled model."""
HALF_LIFE_USES = 4096
"""After so many uses of the expert, what it answered before counts half."""
FEW_ROWS = 64
LEARNED_OF = 4
"""Of a layer's calls with few rows, every so-manieth is learned from: decoding must not wait for it."""


def spare(
    routing: Routing, warmth_E: Tensor, size_E: Tensor, known_E: Tensor, threshold: float
) -> Tensor | None:
    """Which of the chosen experts need not be computed: (T, K) bool, or None where there is none.

    Those that are not resident, whose mean is known, and whose part in the token's output is less than `threshold` of
    an even share: part = mixing weight / sum of weights * K * the expert's size. A token's heaviest expert is always
    computed. size_E: how large the experts' outputs are, around 1; see `OutputMeans.sizes`.
    """
    weights_TK, experts_TK = routing.weights_TK, routing.experts_TK
    can_E = ((warmth_E == 0) & known_E).float()
    # Experts that cannot be spared count as endlessly large.
    size_E = torch.where(can_E > 0, size_E, torch.inf)
    share_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * weights_TK.shape[1]
    spared_TK = share_TK * size_E[experts_TK] < threshold
    spared_TK.scatter_(-1, weights_TK.argmax(-1, keepdim=True), False)
    return spared_TK if bool(spared_TK.any()) else None


def replace_spared(routing: Routing, spared_TK: Tensor, means_ED: Tensor) -> Routing:
    """The routing without the spared experts, with the weighted sum of their means in their place.

    The weights of the others stay: giving them more was tried, and cost far more quality than it saved.
    """
    mix_TE = routing.weights_TK.new_zeros(len(spared_TK), len(means_ED))
    mix_TE.scatter_(-1, routing.experts_TK, routing.weights_TK * spared_TK)
    rows = spared_TK.any(-1).nonzero().squeeze(-1)
    stand_ins = StandIns(rows, mix_TE.index_select(0, rows) @ means_ED)
    return Routing(
        routing.experts_TK.masked_fill(spared_TK, ABSENT),
        routing.weights_TK.masked_fill(spared_TK, 0.0),
        has_absent=True,
        stand_ins=stand_ins,
    )


@dataclass
class _LayerMeans:
    """What one layer's experts answered so far. Sums decay with each expert's own uses."""

    output_ED: Tensor
    """Sum of output rows."""
    norm_E: Tensor
    """Sum of output norms."""
    uses_E: Tensor
    num_calls: int = 0
    mean_norm: float = 0.0
    """Of all uses in the layer."""

    def learn(self, experts: Tensor, counts: Tensor, rows_RD: Tensor) -> None:
        """Leaves a call out whose rows are not all finite: it would stay in every mean for good."""
        rows_RD = rows_RD.float()
        norms_R = rows_RD.norm(dim=-1)
        if not bool(norms_R.isfinite().all()):
            return
        keep = torch.exp2(counts / -HALF_LIFE_USES)
        expert_R = experts.repeat_interleave(counts)
        self.output_ED[experts] *= keep.unsqueeze(-1)
        self.output_ED.index_add_(0, expert_R, rows_RD)
        for total_E, values_R in (
            (self.norm_E, norms_R),
            (self.uses_E, torch.ones(len(expert_R))),
        ):
            total_E[experts] *= keep
            total_E.index_add_(0, expert_R, values_R)
        self.mean_norm = float(self.norm_E.sum() / self.uses_E.sum())


class OutputMeans:
    """The mean outputs of a component's experts, learned from all of its traffic. Not safe for several threads.

    Holds (D + 2) float32 numbers an expert: 8 KB for one of 9.4 MB.
    """

    def __init__(self, num_experts: int, width: int, layers: Sequence[int]) -> None:
        self.is_learning = False
        """Set with the first request that could use it: a service that never has one pays nothing."""
        self._norm_of_layers = 0.0
        self._num_seen = 0
        """Layers that something is known of, and the sum of their mean norms."""
        self._layers = {
            layer: _LayerMeans(torch.zeros(num_experts, width), *torch.zeros(2, num_experts))
            for layer in layers
        }

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        """See RoutingWatcher: learn from every call with many rows, and from some with few."""
        if not self.is_learning:
            return
        layer = self._layers[gate.layer]
        layer.num_calls += 1
        if len(rows_RD) < FEW_ROWS and layer.num_calls % LEARNED_OF:
            return
        call = dispatched.call
        before = layer.mean_norm
        layer.learn(torch.tensor(call.experts), torch.tensor(call.counts), rows_RD)
        self._norm_of_layers += layer.mean_norm - before
        self._num_seen += not before and layer.mean_norm > 0

    def sizes(self, layer: int) -> tuple[Tensor, Tensor]:
        """(E,) mean output norms, and (E,) bool of which experts enough is known.

        Norms are parts of a mean: of the layer's own to the power 1 - LAYER_EXPONENT times the layers' mean to the
        power LAYER_EXPONENT.
        """
        means = self._layers[layer]
        known_E = means.uses_E >= MIN_USES
        own, model = means.mean_norm, self._norm_of_layers / max(1, self._num_seen)
        unit = own ** (1 - LAYER_EXPONENT) * model**LAYER_EXPONENT
        return means.norm_E / means.uses_E.clamp_min(1.0) / max(unit, 1e-9), known_E

    def means(self, layer: int) -> Tensor:
        """(E, D) mean outputs."""
        means = self._layers[layer]
        return means.output_ED / means.uses_E.clamp_min(1e-9).unsqueeze(-1)
