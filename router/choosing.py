"""From scores to the experts of rows that share a policy, given what is resident. Called by `router.steering`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from router.expert_facts import Residents
from router.output_means import OutputMeans
from router.scoring import Routing, ScoreTerms, SnarcWeights, route_scored
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
        self, gate: GateOutput, logits_RE: Tensor, terms: ScoreTerms | None, k: int, residents: Residents
    ) -> Choice:
        """gate: of the whole step. logits_RE: float32, of the rows. terms: None under native routing. residents: the
        experts that are in memory when the step comes to the layer."""
        ...


class ResidentChooser:
    """All rows of a step see the same experts in memory."""

    def __init__(self, weights: SnarcWeights, means: OutputMeans | None) -> None:
        self._weights, self._means = weights, means

    def choose(
        self, gate: GateOutput, logits_RE: Tensor, terms: ScoreTerms | None, k: int, residents: Residents
    ) -> Choice:
        """See Chooser."""
        if terms is None:
            chosen = gate.best(logits_RE, k)
        else:
            chosen = route_scored(logits_RE, terms.total(), k, gate.normalise, self._weights.keep_best)
        cold_RK = residents.cold_E[chosen.experts_TK]
        if terms is None or self._means is None:
            return Choice(chosen, cold_RK, None, chosen)
        spared_RK = spare(chosen, cold_RK, self._means.sizes(gate.layer), self._weights.stand_in)
        if spared_RK is None:
            return Choice(chosen, cold_RK, None, chosen)
        routing = replace_spared(chosen, spared_RK, self._means.means(gate.layer))
        return Choice(chosen, cold_RK, spared_RK, routing)
