"""Dispatch and combine: from routed tokens to an expert call, and from its rows back to tokens.

The pair shares one record, `Dispatch`. Combining adds a token's rows in the order of their rank in its top-k,
in float32, so the result does not depend on where or in which order the rows were computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.call import ExpertCall
from router.scoring import Routing


@dataclass(frozen=True)
class Dispatch:
    """A call together with where its rows belong."""

    call: ExpertCall
    row_of_slot: Tensor
    """(T * K) int64: the call's output row for token t's rank r, at t * K + r."""
    weights_TK: Tensor


def dispatch(component: str, layer: int, tokens_TD: Tensor, routing: Routing, trace: str = "") -> Dispatch:
    """Sort (token, rank) slots by expert, tokens ascending within one. Reads the routing back once."""
    chosen = routing.experts_TK.tolist()
    by_expert: dict[int, list[int]] = {}
    num_ranks = routing.experts_TK.shape[1]
    for token, experts in enumerate(chosen):
        for rank, expert in enumerate(experts):
            by_expert.setdefault(expert, []).append(token * num_ranks + rank)
    experts = sorted(by_expert)
    slots = [slot for expert in experts for slot in by_expert[expert]]
    row_of_slot = [0] * len(slots)
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
    return Dispatch(call, torch.tensor(row_of_slot, device=tokens_TD.device), routing.weights_TK)


def combine(dispatched: Dispatch, rows_RD: Tensor) -> Tensor:
    """Weighted sum of each token's rows, rank by rank, in float32. (R, D) -> (T, D) float32."""
    num_tokens, num_ranks = dispatched.weights_TK.shape
    slots = rows_RD.index_select(0, dispatched.row_of_slot).view(num_tokens, num_ranks, -1).float()
    slots.mul_(dispatched.weights_TK.unsqueeze(-1))
    # One addition per rank: a reduction would be free to choose its own order, a fused multiply-add to round once.
    total_TD = slots[:, 0]
    for rank in range(1, num_ranks):
        total_TD = total_TD + slots[:, rank]
    return total_TD
