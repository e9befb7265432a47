"""What answers say of tokens that were found computed, and who finds whose, over a real engine in one process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.http.api_keys import KeyRing, check_key
from gateway.local.study import trace_service
from gateway.service.layout import engine_options
from gateway.service.option_values import merge_values
from gateway.service.options import ServiceOptions, compose_options
from router.loading import EngineOptions, LoadedEngine
from tests.engines import open_engine
from tests.gateway.fake_router import stories_tokenizer
from tests.one_process import http_service

IDS = [(13 * i + i // 9) % 900 + 50 for i in range(400)]
BODY = {"model": "stories", "prompt": IDS[:200], "max_tokens": 4, "seed": 5}


@pytest.fixture
def loaded(stories_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions(dtype="float32"))
    yield loaded
    loaded.close()


def _ask(
    root: Path, loaded: LoadedEngine, *bodies: dict[str, Any], keys: tuple[str, ...] = ()
) -> list[httpx.Response]:
    """One after another, each with the key of its place where there are some."""

    async def run() -> list[httpx.Response]:
        async with http_service(root, loaded, stories_tokenizer(), keys=KeyRing.of(keys)) as client:
            answers = []
            for number, body in enumerate(bodies):
                headers = {"Authorization": f"Bearer {keys[number]}"} if keys else {}
                answers.append(await client.post("/v1/completions", json=body, headers=headers))
            return answers

    return asyncio.run(run())


def _cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_second_answer_counts_what_it_found_and_has_the_same_text(
    stories_store: Path, loaded: LoadedEngine
) -> None:
    first, second, longer = _ask(stories_store, loaded, BODY, BODY, {**BODY, "prompt": IDS[:260]})
    assert [_cached(answer) for answer in (first, second, longer)] == [0, 192, 192]
    assert first.json()["choices"] == second.json()["choices"]


def test_stream_with_usage_says_it_too(stories_store: Path, loaded: LoadedEngine) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, streamed = _ask(stories_store, loaded, BODY, {**BODY, **options})
    lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: ")]
    usage = json.loads(lines[-2])["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 192}


def test_prompts_count_once_however_many_answers_they_get(stories_store: Path, loaded: LoadedEngine) -> None:
    both = {**BODY, "prompt": [IDS[:200], IDS[200:300]], "n": 3}
    _, again = _ask(stories_store, loaded, both, both)
    assert _cached(again) == 192 + 64


def test_echoed_prompt_with_logprobs_is_computed_whole(stories_store: Path, loaded: LoadedEngine) -> None:
    _, scored, echoed = _ask(
        stories_store, loaded, BODY, {**BODY, "echo": True, "logprobs": 1}, {**BODY, "echo": True}
    )
    assert _cached(scored) == 0
    assert _cached(echoed) == 192


def test_each_key_finds_its_own_only(stories_store: Path, loaded: LoadedEngine) -> None:
    answers = _ask(stories_store, loaded, BODY, BODY, BODY, keys=("alice", "bob", "carol"))
    assert [_cached(answer) for answer in answers] == [0, 0, 0]
    (again,) = _ask(stories_store, loaded, BODY, keys=("bob",))
    assert _cached(again) == 192, "whatever other keys there are"
    (open_,) = _ask(stories_store, loaded, BODY)
    assert _cached(open_) == 0


def test_owner_s_name_tells_nothing_of_the_key() -> None:
    keys = KeyRing.of(["sk-secret", "other"])

    def owner(key: str) -> str:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        return check_key({"method": "POST", "path": "/v1/completions", "headers": headers}, keys)

    assert owner("sk-secret") == owner("sk-secret") != owner("other")
    assert "secret" not in owner("sk-secret")
    assert all(digest.hex()[:8] not in owner("sk-secret") for digest in keys.digests)
    assert check_key({"method": "GET", "path": "/health", "headers": []}, keys) == ""


def test_traced_service_finds_nothing(stories_store: Path, loaded: LoadedEngine, tmp_path: Path) -> None:
    trace = trace_service(loaded, tmp_path, has_tokens=False)
    answers = _ask(stories_store, loaded, BODY, BODY)
    trace.close()
    assert [_cached(answer) for answer in answers] == [0, 0]


def _options(**given: Any) -> ServiceOptions:
    return compose_options(merge_values(given, {}, "file"), Path("store"), "m", KeyRing())


def test_prefix_cache_is_on_unless_told_otherwise_or_traced() -> None:
    assert _options().shown()["prefix-cache"] is True
    assert engine_options(_options(), "float32", 1).prefix_cache
    off = _options(**{"prefix-cache": False})
    assert off.shown()["prefix-cache"] is False
    assert not engine_options(off, "float32", 1).prefix_cache
    assert _options(trace="folder").shown()["prefix-cache"] is False


def test_engine_without_the_cache_keeps_nothing(stories_store: Path) -> None:
    loaded = open_engine(stories_store, EngineOptions(dtype="float32", prefix_cache=False))
    answers = _ask(stories_store, loaded, BODY, BODY)
    loaded.close()
    assert [_cached(answer) for answer in answers] == [0, 0]
    assert loaded.engine.allocator.prefixes.num_known == 0 and loaded.engine.kv.prefix_status() is None
