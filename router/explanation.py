"""Why tokens got their experts: the chosen ones with the parts of their scores, for requests that asked.

Called by `router.steering` in every layer; what it makes goes out with the end of the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from router.routing_choice import MAX_EXPLAINED, ExplainedExpert, ExplainedLayer
from router.scoring import Routing, ScoreTerms
from router.snarc import Signals
from router.steering_plan import RowGroup

DIGITS = 6


def explain(
    group: RowGroup,
    layer: int,
    routing: Routing,
    terms: ScoreTerms,
    signals: Signals,
    spared_TK: Tensor | None = None,
    *,
    found_so_far: dict[str, list[ExplainedLayer]],
) -> None:
    """Add a layer's choice, for every request of the group that has a row to be explained.

    routing, terms, spared_TK (whose means stood in): of the group's rows. signals: of the step's. Under native routing
    the gate part is the logit. found_so_far: of this step, by request, whose they are when the step has ended.
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
    spared_RK = torch.zeros_like(experts_RK).bool() if spared_TK is None else spared_TK[indices]
    stood_in: list[list[bool]] = spared_RK.tolist()
    all_signals = (
        signals.surprise_T,
        signals.novelty_T,
        signals.arousal_T,
        signals.reward_T,
        signals.conflict_T,
    )
    found = [[0.0] * len(rows) if signal is None else signal[rows].tolist() for signal in all_signals]
    for at, shown in enumerate(group.explained):
        entries = found_so_far.setdefault(shown.state.request.request_id, [])
        if shown.state.num_explained_layers + len(entries) >= MAX_EXPLAINED:
            shown.state.is_cut = True
            continue
        values = zip(*(part[at] for part in parts), strict=True)
        chosen = tuple(map(_explained_expert, experts[at], weights[at], values, stood_in[at]))
        surprise, novelty, arousal, reward, conflict = (round(values[at], DIGITS) for values in found)
        entries.append(
            ExplainedLayer(shown.position, layer, chosen, (surprise, novelty, arousal, reward, conflict))
        )


def _explained_expert(
    expert: int, weight: float, parts: tuple[float, ...], is_spared: bool
) -> ExplainedExpert:
    gate, salience, trust, warmth = (round(value, DIGITS) for value in parts)
    return ExplainedExpert(expert, round(weight, DIGITS), gate, salience, trust, warmth, is_spared)


def _chosen(part_TE: Tensor | None, indices: list[int], experts_RK: Tensor) -> list[list[float]]:
    """(R, K) values of the chosen experts; zeros for a part that weighs nothing."""
    if part_TE is None:
        return [[0.0] * experts_RK.shape[1]] * len(indices)
    values: list[list[float]] = part_TE[indices].gather(-1, experts_RK).tolist()
    return values
