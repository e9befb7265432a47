"""Cuts a call into parts, for different places or times, and puts their rows together again. Pure.

Called by `experts.remote_directory`, `experts.audit` and `router.moe_block`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from experts.call import ExpertCall

Place = str | None
"""An actor's name; None is this process."""


class Share(NamedTuple):
    """A part of a call, and where its rows belong in the whole."""

    call: ExpertCall
    rows: Sequence[int]


def split_by_place(call: ExpertCall, places: Sequence[Place]) -> dict[Place, Share]:
    """places: of each of the call's experts. Each share carries only the tokens that it needs."""
    if len(set(places)) == 1:
        return {places[0]: Share(call, range(call.num_rows))}
    groups: dict[Place, list[int]] = {}
    for index, place in enumerate(places):
        groups.setdefault(place, []).append(index)
    return {place: take(call, indices) for place, indices in groups.items()}


def take(call: ExpertCall, indices: Sequence[int]) -> Share:
    """The part of a call for some of its experts. indices: of these, ascending."""
    starts = [0, *accumulate(call.counts)]
    rows = [row for index in indices for row in range(starts[index], starts[index + 1])]
    return Share(
        with_rows(
            call,
            tuple(call.experts[index] for index in indices),
            tuple(call.counts[index] for index in indices),
            rows,
        ),
        tuple(rows),
    )


def with_rows(
    call: ExpertCall, experts: tuple[int, ...], counts: tuple[int, ...], rows: Sequence[int]
) -> ExpertCall:
    """The call for some of its rows, ascending, which belong to these experts in these numbers."""
    tokens = sorted({call.token_of_R[row] for row in rows})
    place = {token: index for index, token in enumerate(tokens)}
    tokens_TD = call.tokens_TD
    if len(tokens) < tokens_TD.shape[0]:
        tokens_TD = tokens_TD.index_select(0, torch.tensor(tokens, device=tokens_TD.device))
    token_of_R = tuple(place[call.token_of_R[row]] for row in rows)
    return ExpertCall(call.component, call.layer, experts, counts, token_of_R, tokens_TD, call.request_id)


def join(results: Sequence[tuple[Share, Tensor]], num_rows: int) -> Tensor:
    """Put the shares' rows where they belong in the whole call."""
    if len(results) == 1:
        return results[0][1]
    first = results[0][1]
    joined = first.new_empty(num_rows, first.shape[1])
    for share, rows in results:
        joined.index_copy_(0, torch.tensor(share.rows, device=joined.device), rows)
    return joined


def thin(call: ExpertCall, most_rows: int) -> tuple[ExpertCall, list[int]]:
    """A call for all of its experts, but of each only the first rows, at most so many; and which rows these are."""
    counts = tuple(min(count, most_rows) for count in call.counts)
    starts: Iterable[int] = [0, *accumulate(call.counts)]
    rows = [start + i for start, count in zip(starts, counts, strict=False) for i in range(count)]
    return with_rows(call, call.experts, counts, rows), rows
