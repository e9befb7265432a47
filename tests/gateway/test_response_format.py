"""`response_format`: what is taken, what is refused and how, and that answers are valid JSON whatever is drawn."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from fastapi import FastAPI

from gateway.errors import OptionInvalid
from gateway.http.app import build_app
from gateway.http.response_format import JsonForm
from gateway.local.generate import generate
from gateway.local.json_schema import read_grammar
from gateway.routers.pool import PoolLimits, RouterPool
from gateway.text.confined import Confinement
from gateway.text.grammar_check import GrammarChecker
from router.loading import EngineOptions, LoadedEngine
from tests.engines import open_engine, small_engine
from tests.gateway.fake_router import MODEL, FakeRouter, app_over, http_client, script, settings
from tests.gateway.stepped_router import SteppedRouter
from tests.gateway.test_resumed_answers import TEMPLATE, TOKENIZER

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["king", "miller"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 8}


class Person(pydantic.BaseModel):
    """As users of the official client describe an answer."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=8)
    age: int = pydantic.Field(ge=0, le=120)


def _by_schema(schema: object, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.fixture(scope="module")
def loaded(stories_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions())
    yield loaded
    loaded.close()


def _app(*links: SteppedRouter) -> FastAPI:
    pool = RouterPool({f"router-{index}": link for index, link in enumerate(links)}, PoolLimits(retry_s=0.0))
    return build_app(settings(context_length=512), TOKENIZER, TEMPLATE, pool)


def _link(loaded: LoadedEngine, num_steps: int | None = None) -> SteppedRouter:
    return SteppedRouter(small_engine(loaded, 60), num_steps)


@asynccontextmanager
async def _official(app: FastAPI) -> Any:
    async with http_client(app) as http:
        transport: Any = http
        yield openai.AsyncOpenAI(
            api_key="k", base_url="http://gateway/v1", http_client=transport, max_retries=0
        )


def _post(app: FastAPI, body: dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
    async def run() -> httpx.Response:
        async with http_client(app) as client:
            return await client.post(path, json=body)

    return asyncio.run(run())


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("response_format", "schema"),
    [(_by_schema(SCHEMA, strict=True), SCHEMA), (_by_schema(SCHEMA), SCHEMA)],
    ids=["strict", "not strict"],
)
def test_answers_of_the_official_client_are_valid(
    loaded: LoadedEngine, response_format: Any, schema: dict[str, Any], is_streamed: bool
) -> None:
    async def run() -> list[tuple[str, str | None]]:
        found = []
        async with _official(_app(_link(loaded))) as client:
            for seed in range(6):
                asked: dict[str, Any] = {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": "Who?"}],
                    "response_format": response_format,
                    "seed": seed,
                    "n": 2,
                    "max_tokens": 150,
                }
                if not is_streamed:
                    answer = await client.chat.completions.create(**asked)
                    found += [(choice.message.content, choice.finish_reason) for choice in answer.choices]
                    continue
                texts, ends = ["", ""], ["", ""]
                async for chunk in await client.chat.completions.create(**asked, stream=True):
                    for choice in chunk.choices:
                        texts[choice.index] += choice.delta.content or ""
                        ends[choice.index] += choice.finish_reason or ""
                found += list(zip(texts, ends, strict=True))
        return found

    for text, reason in asyncio.run(run()):
        assert reason == "stop"
        jsonschema.validate(json.loads(text), schema)


def test_models_of_pydantic_are_parsed_by_the_official_client(loaded: LoadedEngine) -> None:
    async def run() -> Any:
        async with _official(_app(_link(loaded))) as client:
            return await client.chat.completions.parse(
                model=MODEL,
                messages=[{"role": "user", "content": "Who?"}],
                response_format=Person,
                seed=2,
                max_tokens=150,
            )

    assert isinstance(asyncio.run(run()).choices[0].message.parsed, Person)


def test_json_object_is_an_object_or_its_beginning(loaded: LoadedEngine) -> None:
    """In a completion with everything else that concerns its text."""
    app = _app(_link(loaded))
    body = BODY | {"response_format": {"type": "json_object"}, "max_tokens": 60, "n": 3, "echo": True}
    ended = 0
    for seed in range(4):
        answer = _post(app, body | {"seed": seed, "logprobs": 1, "logit_bias": {"300": 1}}).json()
        for choice in answer["choices"]:
            text = choice["text"].removeprefix("hello")
            assert text.startswith("{")
            if choice["finish_reason"] == "stop":
                ended += 1
                assert isinstance(json.loads(text), dict)
            else:
                assert choice["finish_reason"] == "length"
    short = _post(app, body | {"max_tokens": 1, "echo": False, "seed": 1}).json()
    assert {choice["finish_reason"] for choice in short["choices"]} == {"length"}


def test_stop_strings_cut_json_as_any_text(loaded: LoadedEngine) -> None:
    body = BODY | {"response_format": _by_schema(SCHEMA), "max_tokens": 150, "seed": 3, "stop": '"age'}
    (choice,) = _post(_app(_link(loaded)), body).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"].startswith("{") and "age" not in choice["text"]


@pytest.mark.parametrize("num_steps", [1, 2, 7, 15])
def test_answer_whose_router_dies_is_the_answer(loaded: LoadedEngine, num_steps: int) -> None:
    body = BODY | {"response_format": _by_schema(SCHEMA), "max_tokens": 150, "seed": 4, "logprobs": 2}
    whole = _post(_app(_link(loaded)), body).json()
    mortal = _link(loaded, num_steps)
    resumed = _post(_app(mortal, _link(loaded)), body).json()
    assert mortal.is_dead
    assert resumed["choices"] == whole["choices"]
    assert resumed["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("json", "must be an object whose type is"),
        ({"type": "grammar"}, "must be an object whose type is"),
        ({"type": "json_schema"}, "json_schema must be an object"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "json_schema.name must be"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "json_schema.name must be"),
        (_by_schema(True), "json_schema.schema must be an object"),
        (_by_schema(None), "json_schema.schema must be an object"),
        (_by_schema({}, strict="yes"), "json_schema.strict must be true or false"),
        (_by_schema({"x-guidance": {"lenient": True}}), "must not have the key x-guidance"),
        (_by_schema({"enum": ["x" * 140_000]}), "at most 131072 characters"),
    ],
)
def test_malformed_format_is_refused_with_what_it_must_be(value: object, reason: str) -> None:
    response = _post(app_over(FakeRouter(script([5]))), BODY | {"response_format": value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "invalid_value")
    assert reason in error["message"]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strnig"}, "Invalid type: strnig"),
        ({"$ref": "#/$defs/absent"}, "does not exist"),
        ({"$ref": "https://elsewhere/schema"}, "not present"),
        ({"$ref": "#"}, "no text can follow it"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "array", "uniqueItems": True, "contains": {}}, "not supported: contains, uniqueItems"),
        ({"type": "string", "format": "int32"}, "a format that is not supported: int32"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf is not supported"),
    ],
)
def test_schema_that_cannot_be_followed_is_refused_by_what_is_wrong(schema: object, reason: str) -> None:
    router = FakeRouter(script([5]))
    response = _post(app_over(router), BODY | {"response_format": _by_schema(schema, strict=True)})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "invalid_json_schema")
    assert "response_format 'answer'" in error["message"] and reason in error["message"]
    assert not router.requests


def test_what_is_not_enforced_is_named_where_strict_is_not_asked_for() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "uniqueItems": True},
            "b": {"type": "string", "format": "int32"},
        },
    }
    router = FakeRouter(script([5]))
    response = _post(app_over(router), BODY | {"response_format": _by_schema(schema), "priority": 1})
    assert response.status_code == 200
    named = response.headers["x-sage-ignored"].split(", ")
    assert named == ["priority", "response_format.uniqueItems", "response_format.format"]
    assert router.requests[0].sampling.grammar is not None


def _hostile() -> dict[str, dict[str, Any]]:
    doubling = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(25)}
    return {
        "references that double": {
            "$defs": {**doubling, "d25": {"type": "string", "pattern": "a+"}},
            "$ref": "#/$defs/d0",
        },
        "patterns that multiply": {
            "allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{{i}}}.*"} for i in range(20)]
        },
        "alternatives that multiply": {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}": {"const": j}}, "required": [f"a{i}"]} for j in range(4)]}
                for i in range(20)
            ]
        },
        "thousands of properties": {
            "type": "object",
            "properties": {
                f"p{i}": {"type": "string", "pattern": f"[a-z]{{{i % 50}}}x+"} for i in range(2000)
            },
        },
    }


@pytest.mark.parametrize("kind", _hostile())
def test_hostile_schema_is_refused_and_the_next_request_served(kind: str) -> None:
    app = app_over(FakeRouter(script([5])))
    response = _post(app, BODY | {"response_format": _by_schema(_hostile()[kind])})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json_schema"
    assert _post(app, BODY | {"response_format": _by_schema(SCHEMA)}).status_code == 200


def test_event_loop_goes_on_while_a_hostile_schema_is_looked_at() -> None:
    async def run() -> int:
        async with http_client(app_over(FakeRouter(script([5])))) as client:
            hostile = BODY | {"response_format": _by_schema(_hostile()["patterns that multiply"])}
            asked = asyncio.create_task(client.post("/v1/completions", json=hostile))
            num_served = 0
            while not asked.done():
                assert (await client.post("/v1/completions", json=BODY)).status_code == 200
                num_served += 1
            assert (await asked).status_code == 400
            return num_served

    assert asyncio.run(run()) > 10


def test_hostile_schemas_hold_up_neither_prompts_nor_another_owners_schema() -> None:
    async def run() -> None:
        checker = GrammarChecker(Confinement(timeout_s=0.5))
        with closing(checker):
            alternatives = _hostile()["patterns that multiply"]["allOf"]
            hostile = [JsonForm({"allOf": [*alternatives, {"pattern": f".*{i}"}]}).grammar for i in range(40)]
            asked = [asyncio.create_task(checker.check_in_turn("hostile", each)) for each in hostile]
            await asyncio.sleep(0.1)
            started = time.monotonic()
            assert await checker.check_in_turn("other", JsonForm(SCHEMA).grammar) == ()
            await asyncio.to_thread(int)
            assert time.monotonic() - started < 5.0
            assert not asked[-1].done()
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(run())


def test_process_that_somebody_ended_is_no_schemas_fault() -> None:
    with closing(GrammarChecker()) as checker:
        checker.check(JsonForm(SCHEMA).grammar)
        assert checker.confined.process is not None
        checker.confined.process.kill()
        checker.confined.process.wait()
        assert checker.check(JsonForm({**SCHEMA, "title": "other"}).grammar) == ()


def test_spoken_answers_are_no_json() -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "modalities": ["text", "audio"],
        "response_format": {"type": "json_object"},
    }
    response = _post(app_over(FakeRouter()), body, "/v1/chat/completions")
    assert response.json()["error"]["param"] == "response_format"


def test_command_line_answers_by_a_schema(stories_store: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    sampling = {"max_tokens": 150, "seed": 5, "grammar": read_grammar(file)}
    answer = generate(stories_store, "Who?", sampling, EngineOptions(kv_budget_bytes=1 << 24))
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), SCHEMA)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"type": "array", "uniqueItems": true}', "not supported: uniqueItems"),
        ('{"x-guidance": {}}', "must not have the key"),
    ],
)
def test_file_that_is_no_schema_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "schema.json"
    file.write_text(content)
    with pytest.raises(OptionInvalid, match=reason):
        read_grammar(file)
