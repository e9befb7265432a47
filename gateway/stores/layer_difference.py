"""How far two outputs of one layer are apart, and whether that is within docs/exactness.md. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from router.single_layer import LayerOutput

TOLERANCE = 1e-4
"""Of float32 across classes and programs, relative to the largest value: docs/exactness.md."""


@dataclass(frozen=True)
class LayerDifference:
    """One layer's row in the answer."""

    layer: int
    worst: float
    """Largest absolute difference of two output values."""
    relative: float
    """Of two output values of a token, to the largest value of that token: the largest."""
    rerouted: float
    """Share of tokens whose chosen experts differ, 0 to 1."""
    is_within: bool

    def as_json(self) -> dict[str, object]:
        """JSON has no infinity."""
        worst, relative = (value if math.isfinite(value) else None for value in (self.worst, self.relative))
        return {
            "layer": self.layer,
            "worst": worst,
            "relative": relative,
            "rerouted": self.rerouted,
            "is_within": self.is_within,
        }


def measure(layer: int, ours: LayerOutput, theirs: LayerOutput) -> LayerDifference:
    """theirs: what is taken to be right.

    A token may go to other experts where the gate's scores at the edge of its choice are closer than the tolerance; its
    output then says nothing and is not measured. Any other choice puts the layer outside, and so does it when no token
    can be measured.
    """
    is_rerouted_T, is_tie_T = _rerouted(ours, theirs)
    measured_T = ~(is_rerouted_T & is_tie_T)
    differences_T = (ours.hidden_TD - theirs.hidden_TD).abs().amax(dim=1)[measured_T]
    sizes_T = theirs.hidden_TD.abs().amax(dim=1)[measured_T]
    relative_T = torch.where(differences_T == 0, 0.0, differences_T / sizes_T)
    worst, relative = (_largest(values_T) for values_T in (differences_T, relative_T))
    return LayerDifference(
        layer,
        worst,
        relative,
        rerouted=float(is_rerouted_T.float().mean()),
        is_within=relative <= TOLERANCE and not bool((is_rerouted_T & ~is_tie_T).any()),
    )


def _rerouted(ours: LayerOutput, theirs: LayerOutput) -> tuple[Tensor, Tensor]:
    """For each token whether its experts differ, in whatever order, and whether its choice was a tie."""
    if ours.experts_TK is None or theirs.experts_TK is None or theirs.logits_TE is None:
        is_other = (ours.experts_TK is None) != (theirs.experts_TK is None)
        nowhere = torch.zeros(len(theirs.hidden_TD), dtype=torch.bool)
        return nowhere | is_other, nowhere
    differs_T = (ours.experts_TK.sort(dim=1).values != theirs.experts_TK.sort(dim=1).values).any(dim=1)
    num_chosen, num_experts = theirs.experts_TK.shape[1], theirs.logits_TE.shape[1]
    if num_chosen == num_experts:
        return differs_T, torch.zeros_like(differs_T)
    sorted_TE = theirs.logits_TE.sort(dim=1, descending=True).values
    margin_T = sorted_TE[:, num_chosen - 1] - sorted_TE[:, num_chosen]
    return differs_T, margin_T <= TOLERANCE * theirs.logits_TE.abs().amax(dim=1)


def _largest(values_T: Tensor) -> float:
    """Infinity where there is none, or one is no number."""
    largest = float(values_T.max()) if len(values_T) else math.inf
    return math.inf if math.isnan(largest) else largest
