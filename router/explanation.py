"""Why tokens got their experts: the chosen ones with the parts of their scores, for requests that asked.

Called by `router.steering` in every layer; what it makes goes out with the end of the answer.
"""

from __future__ import annotations

from torch import Tensor

from router.routing_choice import MAX_EXPLAINED, ExplainedExpert, ExplainedLayer
from router.scoring import Routing, ScoreTerms
from router.snarc import Signals
from router.steering_plan import RowGroup

DIGITS = 6


def explain(group: RowGroup, layer: int, routing: Routing, terms: ScoreTerms, signals: Signals) -> None:
    """Add a layer's choice to every request of the group that has a row to be explained.

    routing, terms: of the group's rows. signals: of the step's. Under native routing the gate part is the logit.
    """
    indices = [shown.index for shown in group.explained]
    rows = [shown.row for shown in group.explained]
    experts_RK = routing.experts_TK[indices]
    warmth_RE = None if terms.warmth_E is None else terms.warmth_E.expand(len(terms.gate_TE), -1)
    parts = [
        _chosen(part, indices, experts_RK)
        for part in (terms.gate_TE, terms.salience_TE, terms.trust_TE, warmth_RE)
    ]
    weights = routing.weights_TK[indices].tolist()
    experts: list[list[int]] = experts_RK.tolist()
    all_signals = (
        signals.surprise_T,
        signals.novelty_T,
        signals.arousal_T,
        signals.reward_T,
        signals.conflict_T,
    )
    found = [[0.0] * len(rows) if signal is None else signal[rows].tolist() for signal in all_signals]
    for at, shown in enumerate(group.explained):
        if shown.state.num_explained_layers >= MAX_EXPLAINED:
            shown.state.is_cut = True
            continue
        chosen = tuple(
            ExplainedExpert(expert, *(round(value, DIGITS) for value in numbers))
            for expert, *numbers in zip(experts[at], weights[at], *(part[at] for part in parts), strict=True)
        )
        surprise, novelty, arousal, reward, conflict = (round(values[at], DIGITS) for values in found)
        shown.state.add_explained(
            ExplainedLayer(shown.position, layer, chosen, (surprise, novelty, arousal, reward, conflict))
        )


def _chosen(part_TE: Tensor | None, indices: list[int], experts_RK: Tensor) -> list[list[float]]:
    """(R, K) values of the chosen experts; zeros for a part that weighs nothing."""
    if part_TE is None:
        return [[0.0] * experts_RK.shape[1]] * len(indices)
    values: list[list[float]] = part_TE[indices].gather(-1, experts_RK).tolist()
    return values
