"""Dispatch and combine: from routed tokens to an expert call, and from its rows back to tokens.

The pair shares one record, `Dispatch`. Combining adds a token's rows in the order of their rank in its top-k,
in float32, so the result does not depend on where or in which order the rows were computed, nor on how many experts
its neighbours in the batch have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.call import ExpertCall
from router.scoring import ABSENT, Routing


@dataclass(frozen=True)
class Dispatch:
    """A call together with where its rows belong."""

    call: ExpertCall
    row_of_slot: Tensor
    """(T * K) int64: the call's output row for token t's rank r, at t * K + r; 0 at an absent rank."""
    weights_TK: Tensor
    absent_TK: Tensor | None = None
    """bool, where some tokens have fewer than K experts."""


def dispatch(component: str, layer: int, tokens_TD: Tensor, routing: Routing, trace: str = "") -> Dispatch:
    """Sort (token, rank) slots by expert, tokens ascending within one. Reads the routing back once."""
    chosen = routing.experts_TK.tolist()
    by_expert: dict[int, list[int]] = {}
    num_ranks = routing.experts_TK.shape[1]
    for token, experts in enumerate(chosen):
        for rank, expert in enumerate(experts):
            by_expert.setdefault(expert, []).append(token * num_ranks + rank)
    by_expert.pop(ABSENT, None)
    experts = sorted(by_expert)
    slots = [slot for expert in experts for slot in by_expert[expert]]
    row_of_slot = [0] * (len(chosen) * num_ranks)
    for row, slot in enumerate(slots):
        row_of_slot[slot] = row
    call = ExpertCall(
        component,
        layer,
        tuple(experts),
        tuple(len(by_expert[expert]) for expert in experts),
        tuple(slot // num_ranks for slot in slots),
        tokens_TD,
        trace,
    )
    absent_TK = routing.experts_TK < 0 if routing.has_absent else None
    return Dispatch(call, torch.tensor(row_of_slot, device=tokens_TD.device), routing.weights_TK, absent_TK)


def combine(dispatched: Dispatch, rows_RD: Tensor) -> Tensor:
    """Weighted sum of each token's rows, rank by rank, in float32. (R, D) -> (T, D) float32."""
    num_tokens, num_ranks = dispatched.weights_TK.shape
    slots = rows_RD.index_select(0, dispatched.row_of_slot).view(num_tokens, num_ranks, -1).float()
    slots.mul_(dispatched.weights_TK.unsqueeze(-1))
    if dispatched.absent_TK is not None:
        # The only number whose addition changes no bit of any other: 0.0 would turn -0.0 into 0.0.
        slots.masked_fill_(dispatched.absent_TK.unsqueeze(-1), -0.0)
    # One addition per rank: a reduction would be free to choose its own order, a fused multiply-add to round once.
    total_TD = slots[:, 0]
    for rank in range(1, num_ranks):
        total_TD = total_TD + slots[:, rank]
    return total_TD
