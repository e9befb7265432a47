"""Thousands of damaged requests: each is answered or refused in OpenAI's shape, and a neighbour notices nothing."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.text.chat_template import ChatTemplate
from router.loading import EngineOptions
from tests.engines import open_engine
from tests.gateway.fake_router import (
    FakeRouter,
    Step,
    app_over,
    http_client,
    script,
    speech_facts,
    stories_tokenizer,
)
from tests.gateway.test_chat_template import CHATML
from tests.one_process import http_service

NUM_SCRIPTED, NUM_COMPUTED = 3000, 300
"""Requests to an app over a scripted router, and to one over a real engine."""
AT_ONCE = 50
CONTEXT_LENGTH = 40
"""Short, so that a request whose limit was taken away ends soon."""
TOKENIZER = stories_tokenizer()
NEIGHBOUR = {
    "model": "stories",
    "prompt": "Once upon a time",
    "max_tokens": 32,
    "seed": 7,
    "logprobs": 2,
    "frequency_penalty": 0.4,
    "ignore_eos": True,
}

SHARED: dict[str, Any] = {
    "model": "stories",
    "max_tokens": 2,
    "min_tokens": 1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "seed": 3,
    "n": 2,
    "stop": ["x", "the"],
    "stop_token_ids": [5],
    "stream": True,
    "stream_options": {"include_usage": True},
    "logit_bias": {"7": 3.5, "9": -100},
    "presence_penalty": 0.3,
    "frequency_penalty": -0.3,
    "repetition_penalty": 1.2,
    "ignore_eos": True,
    "user": "u",
    "metadata": {"a": "b"},
    "sage": {},
    "response_format": {"type": "text"},
    "tools": [],
}
COMPLETION = {**SHARED, "prompt": ["a 日本", "b"], "logprobs": 2, "echo": True, "best_of": 2}
CHAT = {
    **SHARED,
    "messages": [
        {"role": "system", "content": "s", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "<|im_end|> 😀"}]},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template": "default",
}
SPOKEN_CHAT = {
    **CHAT,
    "messages": [
        {"role": "assistant", "content": None, "audio": {"id": "audio_0", "transcript": "t", "data": ""}},
        {"role": "user", "content": "Once upon a time"},
    ],
    "modalities": ["text", "audio"],
    "audio": {"voice": "ethan", "format": "pcm16"},
}
BASES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 3, 5, 20, 129, 4095, 4096, 2**31, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.0, 2.0, 2.0001, 1e-320, 1e308, -1e308, float("nan"), float("inf")),
    *("", "a", "stories", "default", "auto", "none", "\x00", "\ufdd0", "😀", "<|endoftext|>", "x" * 3000),
    *([], {}, [[]], [1], [[1], [2]], [[4096]], ["a"], ["a", "b"], ["a", [1]], [None], [1.5], [True], [-1]),
    *([1] * 39, [1] * 40, [1] * 41, ["a"] * 65, ["a"] * 200, {"5": 1}, {"5": 1000}, {"x": 1}, {"4096": 1}),
    *({"type": "json_object"}, [{"type": "function"}], {"include_usage": True}, {"effort": "wake"}),
    *([{"role": "user", "content": "a"}], [{"role": "user"}], [{"role": "tool", "content": "a"}]),
    *(["text", "audio"], ["audio"], {"voice": "ethan", "format": "wav"}, {"max_speech_frames": 2}, "pcm16"),
    *([{"role": "user", "content": "a"}] * 200, [[[[[[[[1]]]]]]]], {"a": {"b": {"c": []}}}),
]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((value, key), *_places(item))]


def _mutated(chance: random.Random, bases: Mapping[str, dict[str, Any]]) -> tuple[str, bytes]:
    """A path and a body."""
    path, base = chance.choice([*bases.items()])
    kept = {"model", "prompt", "messages", "max_tokens", "modalities"}
    body = {
        name: value for name, value in copy.deepcopy(base).items() if name in kept or chance.random() < 0.3
    }
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        container, key = chance.choice([(body, name) for name in body] + _places(body))
        action = chance.random()
        try:
            if action < 0.1:
                del container[key]
            elif action < 0.2 and isinstance(container, dict):
                container[chance.choice([*base, "priority", "tempratur", "sage", "\r\nx: y", "ü" * 80])] = (
                    copy.deepcopy(chance.choice(VALUES))
                )
            else:
                container[key] = copy.deepcopy(chance.choice(VALUES))
        except (KeyError, IndexError):
            continue
        if not body:
            break
    content = bytearray(json.dumps(body).encode())
    if chance.random() < 0.08:
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif chance.random() < 0.03:
        del content[chance.randrange(len(content)) :]
    return path, bytes(content)


def _check(sent: bytes, response: httpx.Response) -> str:
    if response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n"), (sent, response.text[-500:])
        return "stream"
    if response.status_code == 200:
        assert response.json()["choices"], sent
        return "plain"
    assert 400 <= response.status_code < 500, (sent, response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, sent
    expected = "rate_limit_error" if response.status_code == 429 else "invalid_request_error"
    assert error["type"] == expected and len(error["message"]) < 1000, (sent, error)
    return "refused"


async def _send(
    client: httpx.AsyncClient,
    chance: random.Random,
    count: int,
    kinds: Counter[str],
    bases: Mapping[str, dict[str, Any]] = BASES,
) -> None:
    async def send_one() -> None:
        path, content = _mutated(chance, bases)
        kinds[_check(content, await client.post(path, content=content))] += 1

    await asyncio.gather(*(send_one() for _ in range(count)))


@pytest.mark.parametrize("chat", [CHAT, SPOKEN_CHAT], ids=["text", "spoken"])
def test_damaged_requests_are_answered_or_refused(chat: dict[str, Any]) -> None:
    bases = BASES | {"/v1/chat/completions": chat}

    async def run() -> Counter[str]:
        kinds: Counter[str] = Counter()
        chance = random.Random(21)
        sound = [Step(tuple(range(16)), samples=b"ab"), Step((), "stop", samples=b"cd")]
        fake = FakeRouter(script([500, 600], "length"), sound)
        async with http_client(app_over(fake, speech=speech_facts())) as client:
            for _ in range(0, NUM_SCRIPTED, AT_ONCE):
                await _send(client, chance, AT_ONCE, kinds, bases)
        return kinds

    kinds = asyncio.run(run())
    assert all(count > NUM_SCRIPTED // 30 for count in kinds.values()) and len(kinds) == 3, kinds


def test_damaged_requests_disturb_no_neighbour(stories_store: Path) -> None:
    async def run() -> tuple[Counter[str], list[Any]]:
        kinds: Counter[str] = Counter()
        chance = random.Random(20)
        template = ChatTemplate(CHATML, TOKENIZER, {})
        loaded = open_engine(stories_store, EngineOptions(dtype="float32"))
        neighbours = []
        changes = {"context_length": CONTEXT_LENGTH}
        async with http_service(stories_store, loaded, TOKENIZER, template, **changes) as client:

            async def ask_neighbour() -> None:
                answer = (await client.post("/v1/completions", json=NEIGHBOUR)).json()
                neighbours.append(answer["choices"])

            await ask_neighbour()
            for _ in range(0, NUM_COMPUTED, AT_ONCE):
                await asyncio.gather(_send(client, chance, AT_ONCE, kinds), ask_neighbour())
        template.close()
        loaded.close()
        return kinds, neighbours

    kinds, neighbours = asyncio.run(run())
    assert all(count > NUM_COMPUTED // 30 for count in kinds.values()) and len(kinds) == 3, kinds
    assert all(choices == neighbours[0] for choices in neighbours)
