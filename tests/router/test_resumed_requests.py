"""A request that is resumed with the tokens already sent goes on with the same bits, wherever it was cut.

Of every family and dtype one cut is in tests/router/test_exactness.py; here are all cuts of one answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from router.batcher import BatchLimits
from router.effort import Effort
from router.engine import Engine
from router.errors import PromptInvalid
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.routing_choice import RoutingChoice
from tests.engines import Outcome, open_engine, run_to_end, small_engine

NUM_TOKENS = 64
PROMPT = tuple((7 * i + 3) % 500 for i in range(50))  # the answer crosses a block of 64 positions


@pytest.fixture(scope="module")
def loaded(stories_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions())
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def random_model(tiny_store: Path) -> Iterator[LoadedEngine]:
    """Small, in float32."""
    loaded = open_engine(tiny_store, EngineOptions())
    yield loaded
    loaded.close()


def _cut(request: GenerationRequest, whole: list[int], num_sent: int) -> GenerationRequest:
    name = f"{request.request_id}-{num_sent}"
    return replace(request, request_id=name, generated_ids=tuple(whole[:num_sent]))


def _assert_continues(resumed: Outcome, request: GenerationRequest, whole: Outcome, num_sent: int) -> None:
    name, cut = request.request_id, f"{request.request_id}-{num_sent}"
    assert resumed.tokens[cut] == whole.tokens[name][num_sent:], f"after {num_sent} tokens"
    assert resumed.logprobs[cut] == whole.logprobs[name][num_sent:]
    assert resumed.reasons[cut] == whole.reasons[name]
    assert torch.equal(torch.stack(resumed.logits[cut]), torch.stack(whole.logits[name][num_sent:]))
    assert (cut in resumed.prompt_logprobs) == (num_sent == 0)


@pytest.mark.parametrize(
    ("model", "sampling", "chunk"),
    [
        ("loaded", {"temperature": 0.9, "top_k": 40, "seed": 5, "choice": 2}, 512),
        ("random_model", {"temperature": 0.0}, 33),
        (
            "random_model",
            {"seed": 6, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": ((7, 2.5),)},
            64,
        ),
    ],
    ids=["sampled", "greedy", "penalties"],
)
def test_every_cut_of_an_answer_continues_with_the_same_bits(
    request: pytest.FixtureRequest, model: str, sampling: dict[str, Any], chunk: int
) -> None:
    """Prompt and tokens sent are computed in chunks of any size, beside each other."""
    loaded: LoadedEngine = request.getfixturevalue(model)
    asked = GenerationRequest(
        "r", PROMPT, SamplingParams(NUM_TOKENS, **sampling), num_logprobs=3, num_prompt_logprobs=1
    )
    whole = run_to_end(loaded.engine, [asked])
    cuts = range(NUM_TOKENS)
    limits = BatchLimits(max_batch_tokens=chunk, max_running=min(chunk, NUM_TOKENS))
    engine = small_engine(loaded, 2 * NUM_TOKENS, limits)
    resumed = run_to_end(engine, [_cut(asked, whole.tokens["r"], cut) for cut in cuts])
    for cut in cuts:
        _assert_continues(resumed, asked, whole, cut)


def test_choices_of_one_prompt_that_were_cut_anywhere_share_it_again(loaded: LoadedEngine) -> None:
    """With blocks for the prompt once and the answers' own, and preemption in between."""
    choices = [
        GenerationRequest(
            f"c{choice}", PROMPT * 3, SamplingParams(24, seed=5, choice=choice), num_logprobs=0, group="g"
        )
        for choice in range(4)
    ]
    whole = run_to_end(loaded.engine, choices)
    cuts = (0, 9, 23, 1)
    engine = small_engine(loaded, 6, BatchLimits(admission_reserve=1), num_swap_blocks=2)
    resumed = run_to_end(
        engine, [_cut(each, whole.tokens[each.request_id], n) for each, n in zip(choices, cuts, strict=True)]
    )
    for each, num_sent in zip(choices, cuts, strict=True):
        cut = f"{each.request_id}-{num_sent}"
        assert resumed.tokens[cut] == whole.tokens[each.request_id][num_sent:]
        assert resumed.logprobs[cut] == whole.logprobs[each.request_id][num_sent:]


def _events(engine: Engine, request: GenerationRequest) -> list[TokenEvent]:
    engine.submit(request)
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    return events


@pytest.mark.parametrize("effort", ["wake", "crisis", "auto"])
def test_effort_is_the_same_again_with_what_its_reports_told(loaded: LoadedEngine, effort: Any) -> None:
    request = GenerationRequest(
        "r", PROMPT, SamplingParams(NUM_TOKENS, seed=2), routing=RoutingChoice("native", effort)
    )
    whole = _events(loaded.engine, request)
    tokens = [token for event in whole for token in event.token_ids]
    efforts: list[Effort] = []
    for event in whole:
        assert event.routing is not None
        efforts += event.routing.efforts
    assert len(efforts) == (NUM_TOKENS if effort == "auto" else 0)
    for num_sent in (1, 13, 63):
        resumed = _cut(request, tokens, num_sent)
        resumed = replace(resumed, generated_efforts=tuple(efforts[:num_sent]))
        rest = _events(loaded.engine, resumed)
        assert [token for event in rest for token in event.token_ids] == tokens[num_sent:]
        told, first = rest[-1].routing, whole[-1].routing
        assert told is not None and first is not None
        assert told.tokens_at == first.tokens_at
    if effort == "auto":
        assert len(set(efforts)) > 1, "an answer that never changes its effort proves nothing"


def test_efforts_that_do_not_fit_their_tokens_are_refused(loaded: LoadedEngine) -> None:
    request = GenerationRequest(
        "r", PROMPT, generated_ids=(1, 2), generated_efforts=("wake",), routing=RoutingChoice(effort="auto")
    )
    with pytest.raises(PromptInvalid, match="1 efforts for 2 generated tokens"):
        loaded.engine.submit(request)
