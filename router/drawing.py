"""Which token comes next for sequences of a step, from their logits. Called by `router.engine`."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from torch import Tensor

from router.sampling import sample, sample_rows
from router.sequence import Sequence


def draw(sequence: Sequence, logits_V: Tensor, best: int) -> int:
    """One sequence's next token. best: the likeliest by its logits, which are finite."""
    sampling = sequence.request.sampling
    drawable_V = sequence.drawable(logits_V)
    if sampling.temperature == 0.0 and drawable_V is logits_V:
        return best
    return sample(drawable_V, sampling, sequence.num_generated)


def draw_together(
    finishing: SequenceOf[Sequence], logits_LV: Tensor, best_L: SequenceOf[int]
) -> list[int | None]:
    """The next token of each row that it is drawn from as it is, all of them at once; None where logits are changed
    first. best_L: the likeliest tokens, where logits are finite."""
    drawn: list[int | None] = [None] * len(finishing)
    rows, params, positions = [], [], []
    for row, (sequence, best) in enumerate(zip(finishing, best_L, strict=True)):
        sampling = sequence.request.sampling
        if sampling.has_adjustments or not sampling.max_tokens:
            continue
        if sampling.temperature and best >= 0:
            rows.append(row)
            params.append(sampling)
            positions.append(sequence.num_generated)
        else:
            drawn[row] = best
    if rows:
        chosen_SV = logits_LV if len(rows) == len(finishing) else logits_LV[rows]
        for row, token in zip(rows, sample_rows(chosen_SV, params, positions), strict=True):
            drawn[row] = token
    return drawn
