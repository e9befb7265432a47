"""Natural log probabilities of tokens, from one row of logits. Pure.

A row is always reduced alone and in blocks of fixed size, so that a prompt's numbers depend neither on its chunks nor
on the number of threads. Called by `router.engine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from router.request import TokenLogprob

SUM_BLOCK = 1024
HEAD_ROWS = 64
"""Prompt positions whose logits are in memory at a time."""


def token_logprob(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """The token's logprob and those of the `num_top` best. logits_V: float32, finite."""
    normaliser = log_normaliser(logits_V)
    top = [(best, float(logits_V[best]) - normaliser) for best in best_tokens(logits_V, num_top)]
    return TokenLogprob(token_id, float(logits_V[token_id]) - normaliser, tuple(top))


def log_normaliser(logits_V: Tensor) -> float:
    """log(sum(exp(logits))), in float64."""
    wide = logits_V.double()
    peak = float(wide.max())
    exps = torch.exp(wide - peak)
    padded = torch.nn.functional.pad(exps, (0, -exps.numel() % SUM_BLOCK))
    # Rows are summed by one thread each; a sum over the whole would be split by the number of threads.
    return peak + math.log(math.fsum(padded.view(-1, SUM_BLOCK).sum(dim=1).tolist()))


def best_tokens(logits_V: Tensor, count: int) -> list[int]:
    """Ids of the largest logits, best first; of equal ones the smaller id first."""
    count = min(count, logits_V.numel())
    if not count:
        return []
    worst = torch.topk(logits_V, count).values[-1]
    ids = (logits_V >= worst).nonzero().flatten()
    order = torch.sort(logits_V[ids], descending=True, stable=True).indices
    return [int(token_id) for token_id in ids[order[:count]]]


def prompt_logprobs(
    hidden_RD: Tensor, following: Sequence[int], num_top: int, to_logits: Callable[[Tensor], Tensor]
) -> list[TokenLogprob] | None:
    """Logprobs of the tokens that follow R prompt positions, whose final hidden states these are; None where logits
    are not finite. A few rows at a time, since a row of logits is as long as the vocabulary."""
    found: list[TokenLogprob] = []
    for first in range(0, len(following), HEAD_ROWS):
        logits_LV = to_logits(hidden_RD[first : first + HEAD_ROWS])
        if not bool(torch.isfinite(logits_LV).all()):
            return None
        for row_V, token_id in zip(logits_LV, following[first : first + HEAD_ROWS], strict=True):
            found.append(token_logprob(row_V, token_id, num_top))
    return found


def prompt_nlls(hidden_RD: Tensor, following: Sequence[int], to_logits: Callable[[Tensor], Tensor]) -> Tensor:
    """(R,) float32 negative log-likelihoods of the tokens that follow R prompt positions: for statistics, which need
    no reduction in a fixed order."""
    parts = []
    for first in range(0, len(following), HEAD_ROWS):
        logits_LV = to_logits(hidden_RD[first : first + HEAD_ROWS])
        ids_L1 = torch.tensor(following[first : first + HEAD_ROWS]).unsqueeze(1)
        parts.append(torch.logsumexp(logits_LV, dim=1) - logits_LV.gather(1, ids_L1).squeeze(1))
    return torch.cat(parts)
