"""From scores to the experts of rows that share a policy, given what is resident. Called by `router.steering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from router.scoring import Routing, ScoreTerms, SnarcWeights, route_native, route_scored
from router.stand_in import OutputMeans, replace_spared, spare
from router.step_routing import GateOutput


class Choice(NamedTuple):
    """The experts of R rows."""

    chosen: Routing
    """Before anything stood in for an expert."""
    spared_RK: Tensor | None
    """bool: which experts their mean outputs stand in for; None where there is none."""
    missed_R: Tensor
    """float32: how many of the chosen are to be computed and were not resident."""
    routing: Routing
    """What is computed."""


class Chooser(Protocol):
    """Decides for rows of one policy and one number of experts. Called on the engine's thread."""

    def choose(self, gate: GateOutput, logits_RE: Tensor, terms: ScoreTerms | None, k: int) -> Choice:
        """gate: of the whole step. logits_RE: float32, of the rows. terms: None under native routing."""
        ...


class ResidentChooser:
    """All rows of a step see the experts that are in memory when the step comes to the layer."""

    def __init__(
        self, warmth: Callable[[int], Tensor], weights: SnarcWeights, means: OutputMeans | None
    ) -> None:
        """warmth: layer -> (E,) 1 for resident experts, else 0."""
        self._warmth, self._weights, self._means = warmth, weights, means

    def choose(self, gate: GateOutput, logits_RE: Tensor, terms: ScoreTerms | None, k: int) -> Choice:
        """See Chooser."""
        warmth_E = self._warmth(gate.layer)
        if terms is None:
            chosen = route_native(logits_RE, k, gate.normalise)
        else:
            chosen = route_scored(logits_RE, terms.total(), k, gate.normalise, self._weights.keep_best)
        missed_R = (1.0 - warmth_E)[chosen.experts_TK].sum(-1)
        spared_RK, routing = None, chosen
        if terms is not None and self._means is not None:
            sizes = self._means.sizes(gate.layer)
            spared_RK = spare(chosen, warmth_E, *sizes, self._weights.stand_in)
        if spared_RK is not None and self._means is not None:
            missed_R = missed_R - spared_RK.sum(-1)
            routing = replace_spared(chosen, spared_RK, self._means.means(gate.layer))
        return Choice(chosen, spared_RK, missed_R, routing)
