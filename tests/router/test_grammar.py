"""Answers that follow a grammar: valid whatever the model draws, and a function of the request alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from gateway.http.response_format import JsonForm
from gateway.text.tokenizer import TextTokenizer
from router.batcher import BatchLimits
from router.errors import GrammarFailed
from router.grammar import Grammars
from router.grammar_limits import GRAMMAR_LIMITS
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams
from tests.engines import Outcome, assert_same_bits, open_engine, run_to_end, small_engine
from tests.gateway.fake_router import STORIES

NODE: dict[str, Any] = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "enum": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2,4}$"},
        },
        "required": ["name", "age", "tags", "id"],
        "additionalProperties": False,
    },
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -5, "maximum": 5}, "maxItems": 4},
    "date": {"type": "string", "format": "date"},
}


@pytest.fixture(scope="module")
def loaded(stories_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions())
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def random_model(tiny_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(tiny_store, EngineOptions())
    yield loaded
    loaded.close()


def _request(name: str, schema: dict[str, Any], seed: int, **sampling: Any) -> GenerationRequest:
    chosen = {"max_tokens": 120, "seed": seed, "stop_token_ids": (0,), "grammar": JsonForm(schema).grammar}
    params = SamplingParams(**(chosen | sampling))
    return GenerationRequest(name, tuple(range(10, 10 + 7 * seed % 90 + 5)), params, num_logprobs=1)


def _requests(num_seeds: int, **sampling: Any) -> list[GenerationRequest]:
    return [
        _request(f"{kind}-{seed}", schema, seed, **sampling)
        for kind, schema in SCHEMAS.items()
        for seed in range(num_seeds)
    ]


@pytest.mark.parametrize("model", ["loaded", "random_model"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
        {"logit_bias": ((34, 3.0),), "presence_penalty": 0.5, "frequency_penalty": 1.0, "min_tokens": 9},
    ],
    ids=["sampled", "greedy", "filters", "adjusted"],
)
def test_every_answer_that_ends_is_valid(
    request: pytest.FixtureRequest, model: str, sampling: dict[str, Any]
) -> None:
    """And one that is cut is the beginning of one that is."""
    engine: LoadedEngine = request.getfixturevalue(model)
    tokenizer = TextTokenizer.from_folder(engine.store.root)
    end = 511 if model == "random_model" else 0
    asked = _requests(4, stop_token_ids=(end,), **sampling)
    outcome = run_to_end(small_engine(engine, 200), asked)
    num_ended = 0
    for each in asked:
        name = each.request_id
        text = tokenizer.decode(outcome.tokens[name])
        if outcome.reasons[name] == "stop":
            num_ended += 1
            jsonschema.validate(json.loads(text), SCHEMAS[name.rsplit("-", 1)[0]])
        else:
            assert outcome.reasons[name] == "length"
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)
    assert num_ended > len(asked) // 3


def _alone(loaded: LoadedEngine, requests: list[GenerationRequest]) -> Outcome:
    reference = Outcome()
    for each in requests:
        one = run_to_end(small_engine(loaded, 60), [each])
        for part in ("tokens", "logits", "reasons", "logprobs", "prompt_logprobs"):
            getattr(reference, part).update(getattr(one, part))
    return reference


@pytest.fixture(scope="module")
def mixed() -> list[GenerationRequest]:
    """Some with a grammar, some without."""
    plain = [replace(each, sampling=replace(each.sampling, grammar=None)) for each in _requests(1)]
    plain = [replace(each, request_id=f"plain-{each.request_id}") for each in plain]
    return [*_requests(2, repetition_penalty=1.1), *plain]


def test_batched_equals_alone(loaded: LoadedEngine, mixed: list[GenerationRequest]) -> None:
    """Also those without a grammar beside it."""
    reference = _alone(loaded, mixed)
    batched = run_to_end(small_engine(loaded, 300), mixed, join_at=[i % 5 for i in range(len(mixed))])
    assert_same_bits(batched, reference)
    assert batched.reasons == reference.reasons


@pytest.mark.parametrize("num_swap_blocks", [0, 40], ids=["computed again", "swapped"])
def test_preempted_answer_goes_on_as_it_would_have(
    loaded: LoadedEngine, mixed: list[GenerationRequest], num_swap_blocks: int
) -> None:
    reference = _alone(loaded, mixed)
    engine = small_engine(loaded, 9, BatchLimits(admission_reserve=1), num_swap_blocks=num_swap_blocks)
    preempted = run_to_end(engine, mixed)
    assert engine.stats.preemptions
    assert_same_bits(preempted, reference)


@pytest.mark.parametrize("sampling", [{"temperature": 0.9}, {"temperature": 0.0, "frequency_penalty": 0.3}])
def test_answer_resumed_after_any_token_continues_with_the_same_bits(
    loaded: LoadedEngine, sampling: dict[str, Any]
) -> None:
    asked = _request("r", SCHEMAS["object"], 3, **sampling)
    whole = run_to_end(small_engine(loaded, 60), [asked])
    tokens = whole.tokens["r"]
    cuts = range(len(tokens))
    resumed = run_to_end(
        small_engine(loaded, 300),
        [replace(asked, request_id=f"r-{cut}", generated_ids=tuple(tokens[:cut])) for cut in cuts],
    )
    for cut in cuts:
        assert resumed.tokens[f"r-{cut}"] == tokens[cut:]
        assert resumed.reasons[f"r-{cut}"] == whole.reasons["r"]
        assert resumed.logprobs[f"r-{cut}"] == whole.logprobs["r"][cut:]
        assert torch.equal(torch.stack(resumed.logits[f"r-{cut}"]), torch.stack(whole.logits["r"][cut:]))


def test_choices_of_one_prompt_equal_single_requests(loaded: LoadedEngine) -> None:
    choices = [
        replace(_request(f"c{choice}", SCHEMAS["object"], 5, choice=choice), group="g") for choice in range(4)
    ]
    together = run_to_end(small_engine(loaded, 60), choices)
    assert together.tokens == _alone(loaded, choices).tokens
    assert len({tuple(tokens) for tokens in together.tokens.values()}) == 4


def test_logprobs_are_the_models_own(loaded: LoadedEngine) -> None:
    asked = _request("r", SCHEMAS["enum"], 1)
    outcome = run_to_end(small_engine(loaded, 60), [asked])
    for logits_V, found in zip(outcome.logits["r"], outcome.logprobs["r"], strict=True):
        expected = torch.log_softmax(logits_V.double(), dim=-1)[found.token_id]
        assert found.logprob == pytest.approx(float(expected), abs=1e-4)


def test_min_tokens_gives_way_where_nothing_can_follow(loaded: LoadedEngine) -> None:
    asked = _request("r", {"enum": ["red"]}, 1, min_tokens=50)
    outcome = run_to_end(small_engine(loaded, 60), [asked])
    assert TextTokenizer.from_folder(loaded.store.root).decode(outcome.tokens["r"]) == '"red"'
    assert outcome.reasons["r"] == "stop"


def test_end_is_not_drawn_where_the_text_may_not_end(random_model: LoadedEngine) -> None:
    """Nor where the request does not take it for one."""
    grammars = random_model.engine.grammars
    assert grammars is not None
    state = grammars.begin(JsonForm({"type": "integer"}).grammar, (511,))
    logits = torch.zeros(512)
    assert state.allowed_only(logits)[511] == float("-inf")
    state.take(ord("7"))
    assert state.allowed_only(logits)[511] == 0
    state = grammars.begin(JsonForm({"type": "integer"}).grammar, (), [ord("7")])
    assert state.allowed_only(logits)[511] == float("-inf")
    assert not state.is_complete


def test_grammar_that_cannot_be_followed_ends_its_request_alone(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 60)
    with pytest.raises(GrammarFailed, match="cannot be followed"):
        engine.submit(_request("bad", {"type": "nothing"}, 1))
    asked = _request("held", {"type": "integer"}, 1, stop_token_ids=tuple(range(1, 4096)), min_tokens=4)
    good = _request("good", SCHEMAS["enum"], 2)
    outcome = run_to_end(engine, [asked, good])
    assert outcome.reasons == {"held": "error", "good": "stop"}
    assert outcome.tokens["good"] == _alone(loaded, [good]).tokens["good"]


def test_tokenizer_without_control_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(GrammarFailed, match="tokenizer"):
        Grammars(tmp_path, 16).begin(JsonForm({}).grammar, ())


def test_answer_that_grew_too_complex_leaves_no_trace_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAMMAR_LIMITS, "max_lexer_states", 20_000)
    grammars, tokenizer = Grammars(STORIES, 4096), TextTokenizer.from_folder(STORIES)
    grammar = JsonForm({"type": "string", "maxLength": 20_000}).grammar
    (quote,), letter = tokenizer.encode_plain('"'), tokenizer.encode_plain("aa")[-1]

    def taken_until_it_fails() -> int:
        state = grammars.begin(grammar, (), [quote])
        for number in range(4_000):
            try:
                state.take(letter)
            except GrammarFailed:
                return number
        return -1

    first = taken_until_it_fails()
    assert first > 100
    assert taken_until_it_fails() == first
