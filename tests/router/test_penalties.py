"""Penalties and biases against the published implementations, their order, and their place in the engine."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from router.penalties import TokenHistory, adjusted
from router.request import SamplingParams

VOCAB = 60
PROMPT = (3, 5, 5, 9)
ANSWER = (9, 20, 20, 20, 41)


def _logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def _adjusted(params: SamplingParams, logits: torch.Tensor, position: int = len(ANSWER)) -> torch.Tensor:
    return adjusted(logits, params, TokenHistory(PROMPT, ANSWER) if params.has_penalties else None, position)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = _logits()
    ids = torch.tensor([[*PROMPT, *ANSWER]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.unsqueeze(0).clone())[0]
    found = _adjusted(SamplingParams(repetition_penalty=penalty), logits)
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)


def test_minimum_length_equals_transformers() -> None:
    logits = _logits()
    for position in range(4):
        library = MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, [4, 7])
        ids = torch.zeros(1, len(PROMPT) + position, dtype=torch.long)
        found = _adjusted(SamplingParams(min_tokens=2, stop_token_ids=(4, 7)), logits, position)
        assert torch.equal(found.float(), library(ids, logits.unsqueeze(0).clone())[0])


def test_presence_and_frequency_follow_the_api_s_formula() -> None:
    """mu[j] - c[j] * frequency - float(c[j] > 0) * presence, over the answer's tokens alone."""
    logits, counts = _logits().double(), Counter(ANSWER)
    found = _adjusted(SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3), logits)
    expected = [logits[j] - counts[j] * -0.3 - (counts[j] > 0) * 0.7 for j in range(VOCAB)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-15, atol=1e-15)


def test_order_is_repetition_then_penalties_then_bias_then_minimum_length() -> None:
    logits = torch.zeros(VOCAB)
    logits[9] = 4.0
    params = SamplingParams(
        repetition_penalty=2.0,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        logit_bias=((9, 10.0), (4, 3.0)),
        min_tokens=9,
        stop_token_ids=(4,),
    )
    found = _adjusted(params, logits)
    assert float(found[9]) == 4.0 / 2.0 - 0.5 - 1.0 + 10.0
    assert float(found[4]) == float("-inf")
    assert float(logits[9]) == 4.0, "the model's own logits stay as they are"


def test_history_that_grows_equals_one_built_at_once() -> None:
    chance = random.Random(3)
    prompt = [chance.randrange(VOCAB) for _ in range(20)]
    answer = [chance.randrange(VOCAB) for _ in range(30)]
    params = SamplingParams(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.01)
    grown = TokenHistory(prompt, ())
    for position, token in enumerate(answer):
        one = adjusted(_logits(position), params, grown, position)
        other = adjusted(_logits(position), params, TokenHistory(prompt, answer[:position]), position)
        assert torch.equal(one, other)
        grown.add(token)
