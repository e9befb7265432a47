"""Changes to logits before a token is drawn: penalties, biases, and stop tokens held back. Pure but for the history.

All in float64, in one fixed order (repetition, frequency, presence, bias, minimum length), and one element at a time,
so the result is a function of the row and the request alone. Called by `router.sequence`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from router.request import SamplingParams


class TokenHistory:
    """Which tokens a sequence has had. Its size follows the distinct tokens, not the vocabulary."""

    def __init__(self, prompt_ids: Iterable[int], generated_ids: Iterable[int]) -> None:
        self._slots: dict[int, int] = {}
        self._counts: list[int] = []
        for token_id in dict.fromkeys(prompt_ids):
            self._slots[token_id] = len(self._counts)
            self._counts.append(0)
        for token_id in generated_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Note a generated token."""
        slot = self._slots.setdefault(token_id, len(self._counts))
        if slot == len(self._counts):
            self._counts.append(0)
        self._counts[slot] += 1

    def penalise(self, logits_V: Tensor, params: SamplingParams) -> None:
        """In place. logits_V: float64. Sources: Keskar et al. 2019 (CTRL) for the repetition penalty, OpenAI's
        API reference for the others."""
        ids = torch.tensor(list(self._slots), dtype=torch.int64)
        counts = torch.tensor(self._counts, dtype=torch.float64)
        values = logits_V[ids]
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            values = torch.where(values > 0.0, values / penalty, values * penalty)
        values = values - params.frequency_penalty * counts
        values = values - params.presence_penalty * (counts > 0.0).double()
        logits_V[ids] = values


def adjusted(logits_V: Tensor, params: SamplingParams, history: TokenHistory | None, position: int) -> Tensor:
    """The logits that the token at `position` (0 for the first one generated) is drawn from, float64.

    history: needed where there are penalties.
    """
    wide = logits_V.to(torch.float64, copy=True)
    if history is not None:
        history.penalise(wide, params)
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        wide[list(ids)] += torch.tensor(biases, dtype=torch.float64)
    if position < params.min_tokens and params.stop_token_ids:
        wide[list(params.stop_token_ids)] = float("-inf")
    return wide
