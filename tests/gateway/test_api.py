"""The API over a real engine in one process: choices, logprobs, echo, penalties and stops as clients get them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams
from tests.engines import open_engine
from tests.gateway.fake_router import stories_tokenizer
from tests.one_process import http_service

MODEL = "stories"
PROMPT = "Once upon a time there was a king who"
COMPLETION = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 5}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "seed": 5}
TOKENIZER = stories_tokenizer()
LOGPROB_TOLERANCE = 1e-3
"""Of a log-likelihood of a few tokens, float32 against `transformers`."""


@pytest.fixture(scope="module")
def loaded(stories_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions(dtype="float32"))
    yield loaded
    loaded.close()


@pytest.fixture
def post(stories_store: Path, loaded: LoadedEngine) -> Callable[..., list[httpx.Response]]:
    """Answers to several bodies, asked for at once."""

    def run(*bodies: dict[str, Any]) -> list[httpx.Response]:
        async def ask() -> list[httpx.Response]:
            async with http_service(stories_store, loaded, TOKENIZER) as client:
                paths = [
                    "/v1/chat/completions" if "messages" in body else "/v1/completions" for body in bodies
                ]
                return await asyncio.gather(
                    *(client.post(path, json=body) for path, body in zip(paths, bodies, strict=True))
                )

        return asyncio.run(ask())

    return run


def _json(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json())


def _chunks(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def _joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a plain answer, from a stream's chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(
            choice["index"], {"text": "", "finish_reason": None, "logprobs": None, "ends": 0}
        )
        whole["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        for name, values in (choice["logprobs"] or {}).items():
            if isinstance(values, list):
                whole["logprobs"] = whole["logprobs"] or {}
                whole["logprobs"].setdefault(name, []).extend(values)
        whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
        whole["ends"] += choice["finish_reason"] is not None
    assert all(choice.pop("ends") == 1 for choice in choices.values())
    return [choices[index] for index in sorted(choices)]


def _plain(answer: dict[str, Any]) -> list[dict[str, Any]]:
    shown = []
    for index, choice in enumerate(answer["choices"]):
        assert choice["index"] == index
        logprobs = choice["logprobs"] and {k: v for k, v in choice["logprobs"].items() if v is not None}
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        shown.append({"text": text, "finish_reason": choice["finish_reason"], "logprobs": logprobs})
    return shown


@pytest.mark.parametrize(
    "body",
    [
        {**COMPLETION, "n": 3, "logprobs": 2},
        {**COMPLETION, "prompt": [PROMPT, "The wolf", "日本 😀"], "n": 2, "echo": True, "logprobs": 0},
        {**COMPLETION, "prompt": [[500, 600], [700]], "echo": True},
        {**COMPLETION, "logprobs": 3, "stop": [" a", "e"], "min_tokens": 6, "temperature": 1.5},
        {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 3},
        {**CHAT, "logprobs": True, "presence_penalty": 1.5, "logit_bias": {"300": 5}},
        {**COMPLETION, "echo": True, "max_tokens": 0},
    ],
)
def test_stream_equals_the_plain_answer(
    post: Callable[..., list[httpx.Response]], body: dict[str, Any]
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    plain, streamed = post(body, {**body, **options})
    answer, chunks = _json(plain), _chunks(streamed)
    assert _joined(chunks) == _plain(answer)
    assert chunks[-1]["usage"] == answer["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_choices_are_those_of_single_requests(
    post: Callable[..., list[httpx.Response]], loaded: LoadedEngine
) -> None:
    before = loaded.engine.stats.prompt_tokens
    body = {**COMPLETION, "n": 4, "best_of": 4, "logprobs": 0, "top_k": 0, "top_p": 1, "temperature": 1}
    answer = _json(post(body)[0])
    prompt = TOKENIZER.encode(PROMPT)
    assert loaded.engine.stats.prompt_tokens - before == len(prompt) + 3, "the prompt was computed once"
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    num_logged = sum(len(choice["logprobs"]["tokens"]) for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == num_logged
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 4
    for choice, text in enumerate(texts):
        request = GenerationRequest(
            "r", tuple(prompt), SamplingParams(12, seed=5, choice=choice, stop_token_ids=(0,))
        )
        loaded.engine.submit(request)
        tokens: list[int] = []
        while loaded.engine.has_work:
            tokens += [token for event in loaded.engine.step() for token in event.token_ids]
        assert TOKENIZER.decode(tokens) == text


def test_several_prompts_equal_single_ones(post: Callable[..., list[httpx.Response]]) -> None:
    prompts = [PROMPT, "The wolf", PROMPT]
    together, *alone = post(
        {**COMPLETION, "prompt": prompts}, *({**COMPLETION, "prompt": prompt} for prompt in prompts)
    )
    assert _plain(_json(together)) == [_plain(_json(one))[0] for one in alone]
    expected = sum(_json(one)["usage"]["prompt_tokens"] for one in alone)
    assert _json(together)["usage"]["prompt_tokens"] == expected


CONTINUATIONS = {
    PROMPT: [" had three daughters.", " had a motor-car.", " zebra quantum 日本", " was dead"],
    "The princess said: “": ["Yes", "I will go home.", "No, dear father"],
}


def _library_scores(checkpoint: Path, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """As lm-eval scores a model in its own process: sum of logprobs, and whether each token is the best."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    scores = []
    for context, continuation in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0].double()
        logprobs = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
        score = sum(float(row[token]) for row, token in zip(logprobs, continuation, strict=True))
        scores.append((score, logprobs.argmax(-1).tolist() == continuation))
    return scores


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("has_ids", [True, False])
def test_multiple_choice_scores_equal_transformers(
    post: Callable[..., list[httpx.Response]], stories_checkpoint: Path, max_tokens: int, has_ids: bool
) -> None:
    """As lm-eval's local-completions asks and reads: echo, one alternative, the context's tokens cut off."""
    texts = [(context, ending) for context, endings in CONTINUATIONS.items() for ending in endings]
    pairs = []
    for context, ending in texts:
        context_ids, whole = TOKENIZER.encode(context), TOKENIZER.encode(context + ending)
        pairs.append((whole[: len(context_ids)], whole[len(context_ids) :]))
    prompts = [a + b for a, b in pairs] if has_ids else [a + b for a, b in texts]
    body = {"model": MODEL, "prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "echo": True}
    answer = _json(post({**body, "temperature": 0, "seed": 1234})[0])
    found = []
    for choice, (context_ids, ids) in zip(answer["choices"], pairs, strict=True):
        logprobs = choice["logprobs"]
        kept = slice(len(context_ids), len(context_ids) + len(ids))
        assert len(logprobs["tokens"]) == len(context_ids) + len(ids) + max_tokens
        best = [max(top.values()) for top in logprobs["top_logprobs"][kept]]
        found.append((sum(logprobs["token_logprobs"][kept]), logprobs["token_logprobs"][kept] == best))
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert choice["text"].startswith(TOKENIZER.decode(context_ids + ids))
    expected = _library_scores(stories_checkpoint, pairs)
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=LOGPROB_TOLERANCE)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    first = len(next(iter(CONTINUATIONS.values())))
    assert _ranking(found[:first]) == _ranking(expected[:first])


def _ranking(scores: list[tuple[float, bool]]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i][0])


def test_offsets_and_bytes_are_right_where_tokens_share_a_character(
    post: Callable[..., list[httpx.Response]],
) -> None:
    text = "a 日本 😀 b"
    body = {**COMPLETION, "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0}
    choice = _json(post(body)[0])["choices"][0]
    assert choice["text"] == text
    logprobs = choice["logprobs"]
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    ids = TOKENIZER.encode(text)
    raw = [TOKENIZER.token_bytes(token_id) for token_id in ids]
    for position, (offset, token) in enumerate(zip(logprobs["text_offset"], logprobs["tokens"], strict=True)):
        before = b"".join(raw[:position])
        assert offset == len(before.decode("utf-8", "ignore"))
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token


def test_chat_logprobs_list_bytes_and_alternatives(post: Callable[..., list[httpx.Response]]) -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 2, "temperature": 0}
    answer = _json(post(body)[0])
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    raw = b"".join(bytes(entry["bytes"]) for entry in content)
    assert raw.decode() == answer["choices"][0]["message"]["content"]
    for entry in content:
        assert [top["logprob"] for top in entry["top_logprobs"]] == sorted(
            (top["logprob"] for top in entry["top_logprobs"]), reverse=True
        )
        best = entry["top_logprobs"][0]
        assert (entry["token"], entry["logprob"]) == (best["token"], best["logprob"]), "greedy takes the best"


def test_biases_penalties_and_limits_do_what_they_say(post: Callable[..., list[httpx.Response]]) -> None:
    greedy = {**COMPLETION, "temperature": 0, "max_tokens": 40, "logprobs": 1}
    plain, forced, banned, frequent, longer, ignoring, token_stop = map(
        _json,
        post(
            greedy,
            {**greedy, "logit_bias": {"500": 100}},
            {**greedy, "logit_bias": {str(TOKENIZER.encode(" the")[0]): -100}},
            {**greedy, "frequency_penalty": 2, "repetition_penalty": 1.5},
            {**greedy, "logit_bias": {"0": 100}, "min_tokens": 7},
            {**greedy, "logit_bias": {"0": 100}, "ignore_eos": True},
            {**greedy, "stop_token_ids": [TOKENIZER.encode(" the")[0]]},
        ),
    )
    assert set(forced["choices"][0]["logprobs"]["tokens"]) == {TOKENIZER.decode([500])}
    assert " the" in plain["choices"][0]["logprobs"]["tokens"]
    assert " the" not in banned["choices"][0]["logprobs"]["tokens"]
    words = frequent["choices"][0]["logprobs"]["tokens"]
    assert len(set(words)) > len(set(plain["choices"][0]["logprobs"]["tokens"]))
    assert longer["usage"]["completion_tokens"] == 8
    assert longer["choices"][0]["finish_reason"] == "stop"
    assert ignoring["usage"]["completion_tokens"] == 40 and ignoring["choices"][0]["text"] == ""
    stopped = token_stop["choices"][0]
    assert (stopped["finish_reason"], stopped["logprobs"]["tokens"][-1]) == ("stop", " the")
    assert plain["choices"][0]["text"].startswith(stopped["text"])
    assert not stopped["text"].endswith(" the")


def test_logprobs_are_the_model_s_own_whatever_changes_the_draw(
    post: Callable[..., list[httpx.Response]],
) -> None:
    body = {**COMPLETION, "logprobs": 20, "max_tokens": 1, "temperature": 0}
    plain, changed = map(
        _json,
        post(body, {**body, "temperature": 2, "top_k": 1, "logit_bias": {"1": -5}, "presence_penalty": 2}),
    )
    one, other = plain["choices"][0]["logprobs"], changed["choices"][0]["logprobs"]
    assert one["top_logprobs"] == other["top_logprobs"]


def test_header_names_fields_without_effect_plain_and_streamed(
    post: Callable[..., list[httpx.Response]],
) -> None:
    body = {**COMPLETION, "max_tokens": 1, "priority": 1, "user": "u", "foo bar": 1}
    for response in post(body, {**body, "stream": True}):
        assert response.headers.get_list("x-sage-ignored") == ["priority, ?"]
    assert "x-sage-ignored" not in post({**COMPLETION, "max_tokens": 1, "store": True})[0].headers


def test_official_client_reads_choices_and_logprobs(stories_store: Path, loaded: LoadedEngine) -> None:
    async def run() -> None:
        async with http_service(stories_store, loaded, TOKENIZER) as http:
            transport: Any = http
            client = openai.AsyncOpenAI(api_key="k", base_url="http://gateway/v1", http_client=transport)
            chat = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": PROMPT}],
                n=2,
                logprobs=True,
                top_logprobs=1,
                max_completion_tokens=4,
            )
            assert [choice.index for choice in chat.choices] == [0, 1]
            assert all(choice.logprobs and len(choice.logprobs.content or []) == 4 for choice in chat.choices)
            completion = await client.completions.create(
                model=MODEL, prompt=["a", "b"], logprobs=1, echo=True, max_tokens=2
            )
            assert [choice.text[0] for choice in completion.choices] == ["a", "b"]

    asyncio.run(run())


def test_client_that_leaves_takes_all_its_choices_along(stories_store: Path, loaded: LoadedEngine) -> None:
    async def run() -> None:
        async with http_service(stories_store, loaded, TOKENIZER) as client:
            body = {**COMPLETION, "n": 5, "max_tokens": 1500, "ignore_eos": True}
            task = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while loaded.engine.num_running < 5:
                await asyncio.sleep(0.005)
            task.cancel()
            while loaded.engine.has_work:
                await asyncio.sleep(0.005)
        assert loaded.engine.allocator.num_used == 0

    asyncio.run(run())
