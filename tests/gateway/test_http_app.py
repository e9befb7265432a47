"""The HTTP face as clients see it: by plain HTTP, by the official client, and when they go away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from gateway.errors import RouterBusy, RouterUnavailable
from gateway.http import app as http_app
from gateway.http.body_room import FREE_BYTES, BodyRoom
from gateway.http.settings import RequestLimits, SamplingDefaults
from tests.gateway.fake_router import (
    MODEL,
    FakeRouter,
    Step,
    app_over,
    http_client,
    script,
    stories_tokenizer,
)

TOKENIZER = stories_tokenizer()
TEXT = "The king said: 日本 😀 and went home."
IDS = TOKENIZER.encode(TEXT)
CHAT: list[Any] = [{"role": "user", "content": "hello"}]
COMPLETION = {"model": MODEL, "prompt": "hello"}


@asynccontextmanager
async def _official(app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    async with http_client(app) as http:
        transport: Any = http  # the client's releases differ in the package that they take this type from
        yield openai.AsyncOpenAI(
            api_key="k", base_url="http://gateway/v1", http_client=transport, max_retries=0
        )


async def _post(app: FastAPI, body: object, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    async with http_client(app) as client:
        return await client.post(path, json=body, headers=headers)


def _error(response: httpx.Response) -> dict[str, Any]:
    """The answer's error, in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return dict(error)


def _events(response: httpx.Response) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_official_client_gets_the_same_text_plain_and_streamed() -> None:
    async def run() -> None:
        async with _official(app_over(FakeRouter(script(IDS)))) as client:
            plain = await client.completions.create(model=MODEL, prompt="hello")
            assert (plain.choices[0].text, plain.choices[0].finish_reason) == (TEXT, "stop")
            assert plain.usage is not None
            assert plain.usage.completion_tokens == len(IDS) + 1
            assert plain.usage.prompt_tokens == len(TOKENIZER.encode("hello"))
            stream = await client.completions.create(model=MODEL, prompt="hello", stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
            assert chunks[-1].choices[0].finish_reason == "stop"
            assert all(chunk.usage is None for chunk in chunks)

    asyncio.run(run())


def test_official_client_chats_plain_and_streamed() -> None:
    async def run() -> None:
        router = FakeRouter(script(IDS, "length"))
        async with _official(app_over(router)) as client:
            plain = await client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=20)
            assert (plain.choices[0].message.content, plain.choices[0].finish_reason) == (TEXT, "length")
            stream = await client.chat.completions.create(
                model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
        *texts, end, usage = chunks
        assert texts[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == TEXT
        assert end.choices[0].finish_reason == "length"
        assert usage.usage is not None and usage.usage.completion_tokens == len(IDS)
        assert usage.choices == []
        extension = (usage.model_extra or {})["sage"]
        assert extension["quality"] == "exact"
        assert set(extension["timings"]) == {"ttft_s", "tokens_per_s"}
        assert router.requests[0].sampling.max_tokens == 20
        num_prompt = len(router.requests[1].prompt_ids)
        assert router.requests[1].sampling.max_tokens == 64 - num_prompt

    asyncio.run(run())


def test_official_client_lists_models() -> None:
    async def run() -> None:
        async with _official(app_over(FakeRouter())) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("org/other")

    asyncio.run(run())


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("failure", "expected", "code"),
    [
        (RouterBusy(2.2), openai.RateLimitError, "queue_full"),
        (RouterUnavailable("/secret/path"), openai.InternalServerError, "unavailable"),
        (ValueError("secret prompt"), openai.InternalServerError, "internal_error"),
    ],
)
def test_failure_before_the_first_token_has_its_status(
    is_streamed: bool, failure: Exception, expected: type[openai.APIStatusError], code: str
) -> None:
    async def run() -> openai.APIStatusError:
        async with _official(app_over(FakeRouter([Step(raises=failure)]))) as client:
            with pytest.raises(expected) as caught:
                await client.completions.create(model=MODEL, prompt="a", stream=is_streamed)
            return caught.value

    error = asyncio.run(run())
    assert error.code == code
    assert "secret" not in error.response.text
    assert error.request_id
    retry_after = {"queue_full": "3", "unavailable": "1"}.get(code)
    assert error.response.headers.get("retry-after") == retry_after


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (Step(raises=RouterUnavailable("secret")), "The model is not available"),
        (Step(raises=ValueError("secret")), "Internal error"),
        (Step((), "error", "a shard cannot be read"), "a shard cannot be read"),
        (Step((), "cancelled"), "The model is not available"),
    ],
)
def test_failure_in_the_middle_of_a_stream_reaches_the_official_client(ending: Step, message: str) -> None:
    async def run() -> None:
        router = FakeRouter([Step((IDS[0],)), ending])
        async with _official(app_over(router)) as client:
            texts = []
            with pytest.raises(openai.APIError, match=message) as caught:
                async for chunk in await client.completions.create(model=MODEL, prompt="a", stream=True):
                    texts.append(chunk.choices[0].text)
            assert "secret" not in str(caught.value.body)
            assert texts == [TOKENIZER.decode(IDS[:1])]
        response = await _post(app_over(router), {**COMPLETION, "stream": True})
        assert "[DONE]" not in response.text

    asyncio.run(run())


def test_stream_that_ends_without_a_reason_is_an_error() -> None:
    response = asyncio.run(_post(app_over(FakeRouter([Step((IDS[0],))])), COMPLETION))
    assert (response.status_code, _error(response)["code"]) == (503, "unavailable")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_stop_string_across_tokens_ends_the_text_and_the_request(is_streamed: bool) -> None:
    async def run() -> None:
        router = FakeRouter([*(Step((token_id,)) for token_id in IDS), Step(hangs=True)])
        body = {**COMPLETION, "stop": ["home", " 日本 😀 an"], "stream": is_streamed}
        response = await _post(app_over(router), body)
        if is_streamed:
            *chunks, done = _events(response)
            assert done == "[DONE]"
            choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
        else:
            choices = response.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == "The king said:"
        assert choices[-1]["finish_reason"] == "stop"
        assert router.cancelled == [router.requests[0].request_id]

    asyncio.run(run())


def test_merged_events_use_no_token_after_the_stop_string() -> None:
    router = FakeRouter([Step(tuple(IDS), "length")])
    answer = asyncio.run(_post(app_over(router), {**COMPLETION, "stop": " king"})).json()
    assert answer["choices"][0] == {"index": 0, "text": "The", "logprobs": None, "finish_reason": "stop"}
    used = answer["usage"]["completion_tokens"]
    assert TOKENIZER.decode(IDS[:used]).endswith(" king")


def test_sampling_values_reach_the_router() -> None:
    async def run() -> None:
        router = FakeRouter(script(IDS))
        defaults = SamplingDefaults(0.8, 40, 0.95, min_p=0.05, repetition_penalty=1.05)
        app = app_over(router, default_sampling=defaults)
        values = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": -1, "max_tokens": 9}
        values["repetition_penalty"] = 1
        for body in ({**COMPLETION, **values}, COMPLETION, COMPLETION, {**COMPLETION, "temperature": 1e-320}):
            assert (await _post(app, body)).status_code == 200
        chosen, default, other, tiny = [request.sampling for request in router.requests]
        assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_p) == (0.5, 0.25, 7, 0.125)
        assert (chosen.seed, chosen.max_tokens) == (2**64 - 1, 9)
        assert (default.temperature, default.top_k, default.top_p, default.max_tokens) == (0.8, 40, 0.95, 16)
        assert (default.min_p, default.repetition_penalty, chosen.repetition_penalty) == (0.05, 1.05, 1.0)
        assert default.stop_token_ids == (0,)
        assert default.seed != other.seed
        assert tiny.temperature == 0.0
        assert len({request.request_id for request in router.requests}) == 4

    asyncio.run(run())


def test_token_ids_are_used_as_they_are() -> None:
    router = FakeRouter(script(IDS))
    asyncio.run(_post(app_over(router), {**COMPLETION, "prompt": [[5, 4095]]}))
    assert router.requests[0].prompt_ids == (5, 4095)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": [4096]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [10**300]}, "prompt", "invalid_value"),
        ({"prompt": [1] * 64, "max_tokens": 1}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * 64}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * 60, "max_tokens": 5}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 2**31 - 1}, "prompt", "context_length_exceeded"),
        ({"prompt": "x" * 1_000_000}, "prompt", "context_length_exceeded"),
        ({"n": 129}, "n", "invalid_value"),
        ({"prompt": ["a", [1]]}, "prompt", "invalid_value"),
        ({"prompt": ["a", "x" * 1_000_000]}, "prompt.1", "context_length_exceeded"),
        ({"prompt": [[1], [4096]]}, "prompt.1", "invalid_value"),
        ({"prompt": [1] * 65, "max_tokens": 0, "echo": True}, "prompt", "context_length_exceeded"),
        ({"logit_bias": {"4096": 1}}, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [4096]}, "stop_token_ids", "invalid_value"),
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
    ],
)
def test_request_that_does_not_fit_the_model_is_refused(
    change: dict[str, Any], param: str, code: str
) -> None:
    router = FakeRouter(script(IDS))
    response = asyncio.run(_post(app_over(router), {**COMPLETION, **change}))
    error = _error(response)
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert len(error["message"]) < 300
    assert not router.requests


def test_default_answer_length_shrinks_to_the_room_left() -> None:
    router = FakeRouter(script(IDS))
    assert asyncio.run(_post(app_over(router), {**COMPLETION, "prompt": [1] * 60})).status_code == 200
    assert router.requests[0].sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nope", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/%ff%00", 404),
    ],
)
def test_unknown_route_method_or_model_has_openai_s_error_shape(method: str, path: str, status: int) -> None:
    async def run() -> httpx.Response:
        async with http_client(app_over(FakeRouter())) as client:
            return await client.request(method, path)

    response = asyncio.run(run())
    assert response.status_code == status
    _error(response)


def test_unknown_model_in_a_request_is_404() -> None:
    response = asyncio.run(_post(app_over(FakeRouter()), {**COMPLETION, "model": "gpt"}))
    assert (response.status_code, _error(response)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b'{"model": "\\ud800"}', b"\xff", b'{"n": NaN}', b"{}"]
)
def test_malformed_body_is_a_400(path: str, content: bytes) -> None:
    async def run() -> httpx.Response:
        async with http_client(app_over(FakeRouter())) as client:
            return await client.post(path, content=content)

    response = asyncio.run(run())
    assert response.status_code == 400
    _error(response)


def test_oversized_body_and_headers_are_refused() -> None:
    async def run() -> None:
        app = app_over(FakeRouter(), limits=RequestLimits(max_body_bytes=1000, max_header_bytes=2000))
        large = await _post(app, {**COMPLETION, "prompt": "x" * 1000})
        assert (large.status_code, _error(large)["code"]) == (413, "body_too_large")
        long = await _post(app, COMPLETION, **{"x-filler": "x" * 2000})
        assert (long.status_code, _error(long)["code"]) == (431, "headers_too_large")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1.2_X", True), ("a b", False), ("x" * 129, False), ("", False), ("a\"'<", False)],
)
def test_request_id_is_kept_only_when_safe(given: str, is_kept: bool) -> None:
    response = asyncio.run(_post(app_over(FakeRouter(script(IDS))), COMPLETION, **{"x-request-id": given}))
    assert (response.headers["x-request-id"] == given) == is_kept
    assert response.headers["x-request-id"]


def test_service_pages_answer() -> None:
    async def run() -> None:
        router = FakeRouter()
        async with http_client(app_over(router)) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).json() == {"ready": True, "detail": "idle"}
            router.is_ready = False
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/sage/status")).json() == {"model": MODEL}

    asyncio.run(run())


async def _metrics(app: FastAPI) -> dict[str, Any]:
    async with http_client(app) as client:
        text = (await client.get("/metrics")).text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names))
    return {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}


def test_metrics_join_the_router_s_and_count_tokens() -> None:
    async def run() -> None:
        own = "# HELP sage_moe_prompt_tokens_total X\n# TYPE sage_moe_prompt_tokens_total counter\n"
        router = FakeRouter(script(IDS))
        app = app_over(router)
        router.metrics_text = f"{router.metrics_text}{own}sage_moe_prompt_tokens_total 999.0\n"
        await _post(app, {**COMPLETION, "prompt": [1, 2, 3]})
        samples = await _metrics(app)
        assert samples["sage_moe_steps_total"].value == 3.0
        assert samples["sage_moe_prompt_tokens_total"].value == 3.0
        assert samples["sage_moe_completion_tokens_total"].value == len(IDS) + 1
        assert samples["sage_moe_time_to_first_token_seconds_count"].value == 1.0
        assert samples["sage_moe_time_between_tokens_seconds_count"].value == len(IDS)
        assert samples["sage_moe_http_requests_in_flight"].value == 1.0
        assert samples["sage_moe_http_requests_total"].labels == {"route": "/v1/completions", "status": "200"}

    asyncio.run(run())


def test_metrics_survive_the_loss_of_the_router() -> None:
    samples = asyncio.run(_metrics(app_over(FakeRouter(metrics_text=None))))
    assert "sage_moe_http_requests_in_flight" in samples


def test_prompts_are_not_logged_even_when_the_service_breaks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    prompt = "confidential plans"
    router = FakeRouter([Step(raises=ValueError(f"cannot handle {prompt}"))])
    app = app_over(router)
    asyncio.run(_post(app, {**COMPLETION, "prompt": prompt}))
    asyncio.run(_post(app, {**COMPLETION, "prompt": prompt, "max_tokens": 0}))
    assert "ValueError" in caplog.text
    assert prompt not in caplog.text


class _Connection:
    """One request driven by hand over ASGI; `leave` is what a server says when the client has gone."""

    def __init__(self, body: object) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.messages.put_nowait(
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        )
        self.sent: list[dict[str, Any]] = []
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [],
        }

    async def receive(self) -> dict[str, Any]:
        return await self.messages.get()

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


async def _start_and_hang(is_streamed: bool, script: list[Step]) -> tuple[FakeRouter, _Connection, Any]:
    router = FakeRouter(script)
    connection = _Connection({**COMPLETION, "stream": is_streamed})
    app = app_over(router)
    task = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
    await asyncio.wait_for(router.is_hanging.wait(), 10.0)
    return router, connection, task


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_client_that_leaves_cancels_its_request(is_streamed: bool, num_tokens: int) -> None:
    async def run() -> None:
        steps = [Step((IDS[0],))] * num_tokens + [Step(hangs=True)]
        router, connection, task = await _start_and_hang(is_streamed, steps)
        connection.leave()
        await asyncio.wait_for(task, 10.0)
        assert router.cancelled == [router.requests[0].request_id]
        assert len(connection.sent) == (2 if is_streamed and num_tokens else 0)

    asyncio.run(run())


@pytest.mark.parametrize("is_streamed", [False, True])
def test_cancelled_task_cancels_its_request(is_streamed: bool) -> None:
    async def run() -> None:
        router, _connection, task = await _start_and_hang(is_streamed, [Step((IDS[0],)), Step(hangs=True)])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10.0)
        assert router.cancelled == [router.requests[0].request_id]

    asyncio.run(run())


def test_client_that_leaves_while_sending_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        connection = _Connection(COMPLETION)
        connection.messages.get_nowait()
        connection.leave()
        await app_over(FakeRouter())(connection.scope, connection.receive, connection.send)
        assert not connection.sent

    asyncio.run(run())
    assert not caplog.records


def test_nothing_more_is_made_of_a_request_whose_client_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images, for one, take long to decode."""

    async def run() -> None:
        preparing, ended = asyncio.Event(), asyncio.Event()

        async def prepare(*_: object) -> None:
            preparing.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        monkeypatch.setattr(http_app, "prepare_completion", prepare)
        connection, app = _Connection(COMPLETION), app_over(FakeRouter())
        task = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
        await asyncio.wait_for(preparing.wait(), 10.0)
        connection.leave()
        await asyncio.wait_for(task, 10.0)
        assert ended.is_set() and not connection.sent

    asyncio.run(run())


def test_bodies_of_all_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_app, "BodyRoom", partial(BodyRoom, 2 * 100_000))

    async def run() -> None:
        app = app_over(FakeRouter(script(IDS)))
        refused = await _post(app, {**COMPLETION, "user": "x" * (FREE_BYTES + 100_000)})
        assert refused.status_code == 429 and "Retry-After" in refused.headers
        fitting = await _post(app, {**COMPLETION, "user": "x" * (FREE_BYTES + 90_000)})
        assert fitting.status_code == 200, "what the other one held was given back"

    asyncio.run(run())


def test_stream_to_a_client_that_does_not_read_is_not_run_ahead() -> None:
    """Back-pressure: the next token is taken from the router only after the last one was sent."""

    async def run() -> None:
        connection = _Connection({**COMPLETION, "stream": True})
        is_blocked, never = asyncio.Event(), asyncio.Event()

        async def send(message: Any) -> None:
            connection.sent.append(message)
            if len(connection.sent) == 2:
                is_blocked.set()
                await never.wait()

        router = FakeRouter([Step((IDS[0],)), Step(hangs=True)])
        app = app_over(router)
        task = asyncio.create_task(app(connection.scope, connection.receive, send))
        await asyncio.wait_for(is_blocked.wait(), 10.0)
        assert not router.is_hanging.is_set()
        connection.leave()
        await asyncio.wait_for(task, 10.0)
        assert router.cancelled

    asyncio.run(run())
