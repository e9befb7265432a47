"""From scores to the experts of rows that share a policy, given what is resident. Called by `router.steering`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from router.expert_facts import Residents
from router.native_choosing import choose_rows
from router.output_means import OutputMeans
from router.scoring import Routing, ScoreFactors, SnarcWeights, route_scored, score_terms
from router.stand_in import replace_spared, spare
from router.step_routing import GateOutput


class Choice(NamedTuple):
    """The experts of R rows."""

    chosen: Routing
    """Before anything stood in for an expert."""
    cold_RK: Tensor
    """bool: which of them were not resident when they were chosen."""
    spared_RK: Tensor | None
    """bool: which of the cold ones their mean outputs stand in for; None where there is none."""
    routing: Routing
    """What is computed."""

    @property
    def missed_R(self) -> Tensor:
        """int64: how many of the chosen are to be computed and were not resident."""
        missed_RK = self.cold_RK if self.spared_RK is None else self.cold_RK & ~self.spared_RK
        return missed_RK.sum(-1)


class Chooser(Protocol):
    """Decides for rows of one policy and one number of experts. Called on the engine's thread."""

    def choose(
        self, gate: GateOutput, logits_RE: Tensor, factors: ScoreFactors | None, k: int, residents: Residents
    ) -> Choice:
        """gate: of the whole step. logits_RE: float32, of the rows. factors: None under native routing. residents: the
        experts that are in memory when the step comes to the layer."""
        ...


class Picked(NamedTuple):
    """See `Choice`, whose first three these are."""

    chosen: Routing
    cold_RK: Tensor
    spared_RK: Tensor | None


def pick(
    gate: GateOutput,
    logits_RE: Tensor,
    factors: ScoreFactors,
    weights: SnarcWeights,
    k: int,
    cold_E: Tensor,
    size_E: Tensor | None,
) -> Picked:
    """By score, and which of them something may stand in for. cold_E: bool. size_E: of experts' outputs, see
    `stand_in.spare`; None where nothing may."""
    if gate.level is not None:
        experts_RK, weights_RK, cold_RK, spared_RK = choose_rows(
            gate.level, logits_RE, factors, weights, k, gate.normalise, cold_E, size_E
        )
        return Picked(Routing(experts_RK, weights_RK), cold_RK, spared_RK)
    score_RE = score_terms(logits_RE, factors, weights).total()
    chosen = route_scored(logits_RE, score_RE, k, gate.normalise, weights.keep_best)
    cold_RK = cold_E[chosen.experts_TK]
    return Picked(
        chosen, cold_RK, None if size_E is None else spare(chosen, cold_RK, size_E, weights.stand_in)
    )


class ResidentChooser:
    """All rows of a step see the same experts in memory."""

    def __init__(self, weights: SnarcWeights, means: OutputMeans | None) -> None:
        self._weights, self._means = weights, means

    def choose(
        self, gate: GateOutput, logits_RE: Tensor, factors: ScoreFactors | None, k: int, residents: Residents
    ) -> Choice:
        """See Chooser."""
        if factors is None:
            chosen = gate.best(logits_RE, k)
            return Choice(chosen, residents.cold_E[chosen.experts_TK], None, chosen)
        size_E = self._means.sizes(gate.layer) if self._means is not None else None
        picked = pick(gate, logits_RE, factors, self._weights, k, residents.cold_E, size_E)
        if self._means is None or picked.spared_RK is None:
            return Choice(*picked, picked.chosen)
        means_ED = self._means.means(gate.layer)
        return Choice(*picked, replace_spared(picked.chosen, picked.spared_RK, means_ED, gate.level))
