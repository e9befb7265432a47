"""Logprobs against torch's own, and what the engine hands out."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from router.backbone import Backbone
from router.batcher import BatchLimits
from router.loading import EngineOptions
from router.logprobs import best_tokens, log_normaliser, token_logprob
from router.request import GenerationRequest, SamplingParams, TokenEvent, TokenLogprob
from tests.engines import open_engine, run_to_end, small_engine


def _logits(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 5


@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 1025, 40000])
def test_logprob_equals_log_softmax(size: int) -> None:
    logits = _logits(size)
    expected = torch.log_softmax(logits.double(), 0)
    found = token_logprob(logits, size - 1, 3)
    assert found.logprob == pytest.approx(float(expected[-1]), abs=1e-12)
    best = torch.topk(expected, min(3, size))
    assert [token for token, _ in found.top] == best.indices.tolist()
    assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-12)


def test_huge_logits_have_finite_logprobs() -> None:
    found = token_logprob(torch.tensor([3e38, -3e38, 0.0]), 1, 1)
    assert found == TokenLogprob(1, pytest.approx(-6e38, rel=1e-6), ((0, 0.0),))  # type: ignore[arg-type]


def test_equal_logits_are_listed_by_id() -> None:
    logits = torch.zeros(40000)
    logits[[35001, 7, 20000]] = 2.0
    assert best_tokens(logits, 2) == [7, 20000]
    assert best_tokens(torch.zeros(5), 9) == [0, 1, 2, 3, 4]
    assert best_tokens(logits, 0) == []


def test_number_of_threads_changes_no_bit() -> None:
    logits = _logits(150_000)
    before = torch.get_num_threads()
    try:
        found = set()
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            found.add(log_normaliser(logits))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_merged_events_keep_every_logprob() -> None:
    one, two = TokenLogprob(1, -1.0), TokenLogprob(2, -2.0)
    first = TokenEvent("r", (1,), logprobs=(one,), prompt_logprobs=(None, two))
    second = TokenEvent("r", (2,), "length", logprobs=(two,))
    assert first.followed_by(second) == TokenEvent("r", (1, 2), "length", None, (one, two), (None, two))


def test_prompt_is_scored_and_nothing_generated(tiny_store: Path) -> None:
    prompt = tuple(range(3, 40))
    loaded = open_engine(tiny_store, EngineOptions())
    whole = GenerationRequest("w", prompt, SamplingParams(max_tokens=0), num_prompt_logprobs=1)
    chunked = small_engine(loaded, 8, BatchLimits(max_batch_tokens=7))
    outcome, pieces = run_to_end(loaded.engine, [whole]), run_to_end(chunked, [whole])
    assert (outcome.tokens["w"], outcome.reasons["w"]) == ([], "length")
    assert outcome.prompt_logprobs == pieces.prompt_logprobs
    assert outcome.prompt_logprobs["w"][0] is None
    assert [p.token_id for p in outcome.prompt_logprobs["w"] if p] == list(prompt[1:])
    # The logprob of a prompt's token is that of the same token generated.
    generated = GenerationRequest(
        "g", prompt[:9], SamplingParams(max_tokens=1, logit_bias=((prompt[9], 1e6),)), num_logprobs=1
    )
    assert run_to_end(loaded.engine, [generated]).logprobs["g"] == [outcome.prompt_logprobs["w"][9]]
    loaded.close()


def test_head_is_not_computed_for_prompt_positions_unless_asked(tiny_store: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions())
    rows: list[int] = []

    def counted(self: Backbone, hidden: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        rows.append(len(hidden))
        return plain(self, hidden)

    plain = Backbone.logits_and_best
    with mock.patch.object(Backbone, "logits_and_best", counted):
        run_to_end(loaded.engine, [GenerationRequest("r", tuple(range(30)), SamplingParams(max_tokens=1))])
        assert rows == [1]
        request = GenerationRequest(
            "s", tuple(range(100)), SamplingParams(max_tokens=1), num_prompt_logprobs=0
        )
        run_to_end(loaded.engine, [request])
    loaded.close()
    assert rows == [1, 1, 64, 35]


def test_prompt_whose_logits_are_not_finite_fails_alone(tiny_store: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions())
    plain = Backbone.logits

    def broken(self: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        return plain(self, hidden) * (float("nan") if len(hidden) == 4 else 1.0)

    scored = GenerationRequest("s", (1, 2, 3, 4, 5), SamplingParams(max_tokens=2), num_prompt_logprobs=0)
    other = GenerationRequest("o", (1, 2, 3), SamplingParams(max_tokens=2, temperature=0.0))
    alone = run_to_end(loaded.engine, [other])
    with mock.patch.object(Backbone, "logits", broken):
        outcome = run_to_end(loaded.engine, [scored, other])
    loaded.close()
    assert outcome.reasons == {"s": "error", "o": "length"}
    assert outcome.tokens["o"] == alone.tokens["o"]
