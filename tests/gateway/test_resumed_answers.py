"""Whole answers whose router dies: over HTTP, two real engines, the pool between them, and no Ray.

What a client gets is compared with an undisturbed run, value by value: text, logprobs, offsets, finish reasons,
usage, efforts, explanations.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.http.app import build_app
from gateway.http.routing_rules import RoutingRules
from gateway.routers.pool import PoolLimits, RouterPool
from gateway.text.chat_template import ChatTemplate
from router.loading import EngineOptions, LoadedEngine
from tests.engines import open_engine, small_engine
from tests.gateway.fake_router import STORIES, http_client, settings, stories_tokenizer
from tests.gateway.stepped_router import SteppedRouter

TOKENIZER = stories_tokenizer()
TEMPLATE = ChatTemplate.from_folder(STORIES, TOKENIZER)
OPEN = RoutingRules(allowed_policies=("snarc",), allowed_efforts=("wake", "crisis", "auto"))
TALE = {"model": "stories", "prompt": "Once upon a time there was a", "max_tokens": 40}
BODIES: dict[str, dict[str, Any]] = {
    "greedy with logprobs": TALE | {"temperature": 0, "logprobs": 3},
    "sampled choices, penalties, echo": TALE
    | {
        "n": 3,
        "seed": 11,
        "echo": True,
        "logprobs": 1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {"300": -5},
        "max_tokens": 24,
    },
    "several prompts": TALE | {"prompt": ["Once upon", "There was a miller"], "seed": 4, "max_tokens": 20},
    "stop strings after a minimum": TALE | {"temperature": 0, "stop": ["ters", " and"], "min_tokens": 15},
    "chat": {
        "model": "stories",
        "messages": [{"role": "user", "content": "Tell me of a king"}],
        "max_tokens": 30,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    },
    "effort that follows the signals, explained": TALE
    | {"seed": 5, "sage": {"effort": "auto", "explain": True}, "max_tokens": 24},
    "prompt only": TALE | {"max_tokens": 0, "echo": True, "logprobs": 1},
}
DEATHS = (1, 2, 9)
"""Steps of the first router before it dies. The first step is the prompt's, and gives the first token."""


@pytest.fixture(scope="module")
def engines(stories_store: Path) -> Iterator[tuple[LoadedEngine, LoadedEngine]]:
    loaded = open_engine(stories_store, EngineOptions()), open_engine(stories_store, EngineOptions())
    yield loaded
    for each in loaded:
        each.close()


@pytest.fixture(scope="module")
def undisturbed(engines: tuple[LoadedEngine, LoadedEngine]) -> dict[str, Any]:
    return {kind: asyncio.run(_ask(body, _link(engines[0]))) for kind, body in BODIES.items()}


def _link(loaded: LoadedEngine, num_steps: int | None = None) -> SteppedRouter:
    engine = small_engine(loaded, 40)
    engine.policy, engine.reporter = loaded.engine.policy, loaded.engine.reporter
    return SteppedRouter(engine, num_steps)


async def _ask(body: dict[str, Any], *links: SteppedRouter) -> Any:
    pool = RouterPool({f"router-{index}": link for index, link in enumerate(links)}, PoolLimits(retry_s=0.0))
    app = build_app(settings(context_length=512, routing=OPEN), TOKENIZER, TEMPLATE, pool)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    async with http_client(app) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    for link in links:
        link.engine.allocator.check()
        assert link.engine.allocator.num_used == 0
    if not body.get("stream"):
        return _lasting(response.json())
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [_lasting(json.loads(line)) for line in lines]


def _lasting(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two runs of the same request: its id, clock times, and what was in memory."""
    sage = {key: value for key, value in answer.get("sage", {}).items() if key not in ("timings", "misses")}
    return {key: value for key, value in answer.items() if key not in ("id", "created", "sage")} | {
        "sage": sage
    }


@pytest.mark.parametrize("num_steps", DEATHS)
@pytest.mark.parametrize("kind", BODIES)
def test_answer_whose_router_dies_is_the_answer(
    engines: tuple[LoadedEngine, LoadedEngine], undisturbed: dict[str, Any], kind: str, num_steps: int
) -> None:
    mortal, other = _link(engines[0], num_steps), _link(engines[1])
    assert asyncio.run(_ask(BODIES[kind], mortal, other)) == undisturbed[kind]
    assert mortal.is_dead or kind == "prompt only"


@pytest.mark.parametrize("kind", ["sampled choices, penalties, echo", "chat"])
def test_stream_whose_router_dies_shows_the_same_chunks(
    engines: tuple[LoadedEngine, LoadedEngine], kind: str
) -> None:
    """Of each choice; how choices alternate is not promised."""
    first, second = engines
    body = BODIES[kind] | {"stream": True, "stream_options": {"include_usage": True}}
    expected = asyncio.run(_ask(body, _link(first)))
    for num_steps in (2, 9):
        chunks = asyncio.run(_ask(body, _link(first, num_steps), _link(second)))
        assert _by_choice(chunks) == _by_choice(expected)


def _by_choice(chunks: list[dict[str, Any]]) -> dict[int, list[Any]]:
    shown: dict[int, list[Any]] = {-1: [chunk for chunk in chunks if not chunk["choices"]]}
    for chunk in chunks:
        for choice in chunk["choices"]:
            shown.setdefault(choice["index"], []).append(choice)
    return shown


def test_answer_of_the_snarc_policy_says_that_it_was_resumed(
    engines: tuple[LoadedEngine, LoadedEngine],
) -> None:
    body = TALE | {"seed": 1, "sage": {"policy": "snarc"}}
    answer = asyncio.run(_ask(body, _link(engines[0], 9), _link(engines[1])))
    assert (answer["sage"]["policy"], answer["sage"]["resumed"]) == ("snarc", 1)
    assert answer["usage"]["completion_tokens"] == 40
    assert "resumed" not in asyncio.run(_ask(body, _link(engines[0])))["sage"]
