"""Dispatch and combine: from routed tokens to an expert call, and from its rows back to tokens.

The pair shares one record, `Dispatch`. Combining adds a token's rows in the order of their rank in its top-k,
in float32, so the result does not depend on where or in which order the rows were computed, nor on how many experts
its neighbours in the batch have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.devices import upload
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
    num_ranks = routing.experts_TK.shape[1]
    chosen = routing.experts_TK.reshape(-1).cpu().numpy()
    slots = chosen.argsort(kind="stable")
    if routing.has_absent:
        slots = slots[np.count_nonzero(chosen == ABSENT) :]  # which is below every expert
    by_expert = chosen[slots]
    ends = [*(np.flatnonzero(by_expert[1:] != by_expert[:-1]) + 1).tolist(), len(slots)]
    firsts = [0, *ends[:-1]] if len(slots) else []
    row_of_slot = np.zeros(len(chosen), dtype=np.int64)
    row_of_slot[slots] = np.arange(len(slots))
    call = ExpertCall(
        component,
        layer,
        tuple(by_expert[firsts].tolist()) if firsts else (),
        tuple(end - first for first, end in zip(firsts, ends, strict=False)),
        tuple((slots // num_ranks).tolist()),
        tokens_TD,
        trace,
    )
    absent_TK = routing.experts_TK < 0 if routing.has_absent else None
    dispatched = Dispatch(call, torch.from_numpy(row_of_slot), routing.weights_TK, absent_TK)
    return dispatched if tokens_TD.is_cpu else _on_device(dispatched, tokens_TD.device)


def _on_device(dispatched: Dispatch, device: torch.device) -> Dispatch:
    absent_TK = dispatched.absent_TK
    return Dispatch(
        dispatched.call,
        upload(dispatched.row_of_slot, device),
        upload(dispatched.weights_TK, device),
        None if absent_TK is None else upload(absent_TK, device),
    )


def combine(dispatched: Dispatch, rows_RD: Tensor) -> Tensor:
    """Weighted sum of each token's rows, rank by rank, in float32. (R, D) -> (T, D) float32."""
    num_tokens, num_ranks = dispatched.weights_TK.shape
    slots = rows_RD.index_select(0, dispatched.row_of_slot).view(num_tokens, num_ranks, -1).float()
    slots.mul_(dispatched.weights_TK.unsqueeze(-1))
    if dispatched.absent_TK is not None:
        # The only number whose addition changes no bit of any other: 0.0 would turn -0.0 into 0.0.
        slots.masked_fill_(dispatched.absent_TK.unsqueeze(-1), -0.0)
    # One addition per rank: a reduction would be free to choose its own order, a fused multiply-add to round once.
    total_TD, *others = slots.unbind(1)
    for other_TD in others:
        total_TD = total_TD + other_TD
    return total_TD
