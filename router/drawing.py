"""Which token comes next for sequences of a step, from their logits. Called by `router.engine`."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from torch import Tensor

from router.sampling import rows_together, sample, sample_unfiltered
from router.sequence import Sequence


def draw(sequence: Sequence, logits_V: Tensor, best: int) -> int:
    """One sequence's next token. best: the likeliest by its logits, which are finite."""
    sampling = sequence.request.sampling
    drawable_V = sequence.drawable(logits_V)
    if sampling.temperature == 0.0 and drawable_V is logits_V:
        return best
    return sample(drawable_V, sampling, sequence.num_generated)


def draw_unfiltered(finishing: SequenceOf[Sequence], logits_LV: Tensor) -> dict[int, int]:
    """Row -> token, of the rows of which any token may be drawn from the logits as they are: several at once."""
    most = rows_together(logits_LV.shape[1])
    rows = [
        row
        for row, sequence in enumerate(finishing)
        if (sampling := sequence.request.sampling).temperature
        and not (sampling.has_filters or sampling.has_adjustments)
    ]
    if min(len(rows), most) < 2:
        return {}
    drawn: dict[int, int] = {}
    for first in range(0, len(rows), most):
        some = rows[first : first + most]
        params = [finishing[row].request.sampling for row in some]
        positions = [finishing[row].num_generated for row in some]
        chosen_SV = logits_LV if len(some) == len(finishing) else logits_LV[some]
        drawn.update(zip(some, sample_unfiltered(chosen_SV, params, positions), strict=True))
    return drawn
