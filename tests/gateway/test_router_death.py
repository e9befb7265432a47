"""Two routers that share an expert actor on a real Ray, and the death of one, and of both, in the middle of answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.demo.ports import free_port
from gateway.local.generate import generate
from gateway.service.launch import ServiceOptions, running_service
from router.loading import EngineOptions

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

MODEL = "stories"
PROMPT = "Once upon a time there was a king who had three daughters"
RECOVERY_TIMEOUT_S = 120.0
NUM_STREAMS = 4


@dataclass
class Stream:
    """One streamed answer: what every token was, and its exact logprob."""

    seed: int
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    has_begun: threading.Event = field(default_factory=threading.Event)

    def answer(self) -> tuple[object, ...]:
        return self.tokens, self.logprobs, self.text, self.finish_reason, self.usage


@pytest.fixture(scope="module")
def url(stories_store: Path) -> Iterator[str]:
    port = free_port()
    options = ServiceOptions(
        stories_store,
        MODEL,
        port=port,
        num_actors=1,
        num_routers=2,
        num_cpus=2,
        resume_timeout_s=int(RECOVERY_TIMEOUT_S),
        kv_budget_bytes=64 << 20,
    )
    with running_service(options) as url:
        yield url


def _status(url: str) -> Any:
    return httpx.get(f"{url}/sage/status", timeout=30.0).raise_for_status().json()


def _run_stream(url: str, stream: Stream, max_tokens: int) -> Stream:
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "seed": stream.seed,
        "logprobs": 0,
        "frequency_penalty": 0.2,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timeout_s = 2 * RECOVERY_TIMEOUT_S
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=timeout_s) as response:
        for line in response.raise_for_status().iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            stream.usage = event.get("usage") or stream.usage
            for choice in event["choices"]:
                stream.text += choice["text"]
                stream.finish_reason = choice["finish_reason"] or stream.finish_reason
                if choice["logprobs"]:
                    stream.tokens += choice["logprobs"]["tokens"]
                    stream.logprobs += choice["logprobs"]["token_logprobs"]
            if len(stream.tokens) > 5:
                stream.has_begun.set()
    return stream


def _run_streams(url: str, max_tokens: int, disturb: Callable[[], None] = lambda: None) -> list[Stream]:
    """All at once; disturb is called when every one has begun."""
    streams = [Stream(seed) for seed in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        running = [threads.submit(_run_stream, url, stream, max_tokens) for stream in streams]
        for stream in streams:
            assert stream.has_begun.wait(RECOVERY_TIMEOUT_S), "an answer did not begin"
        disturb()
        return [stream.result() for stream in running]


def _kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RECOVERY_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.HTTPError):  # a service that is being mended
            if is_reached():
                return
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.2)


def _metric(url: str, name: str) -> dict[str, float]:
    """By router; "" where a sample is of none."""
    text = httpx.get(f"{url}/metrics", timeout=30.0).raise_for_status().text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return {sample.labels.get("router", ""): sample.value for sample in samples}


def test_routers_share_the_actor_the_work_and_the_numerics(url: str, stories_store: Path) -> None:
    status = _status(url)
    assert [(each["name"], each["state"]) for each in status["routers"]] == [
        ("router-0", "ready"),
        ("router-1", "ready"),
    ]
    assert [each["connected_actors"] for each in status["routers"]] == [1, 1]
    assert len({each["pid"] for each in status["routers"]}) == 2
    planned = {row["process"]: row["budget_bytes"] for row in status["memory"]["processes"]}
    processes = [*(each["experts"] for each in status["routers"]), *status["actors"]]
    assert planned == {process["name"]: process["budget_bytes"] for process in processes}
    sampling = {"max_tokens": 24, "temperature": 0.0}
    body = {"model": MODEL, "prompt": PROMPT} | sampling
    expected = generate(stories_store, PROMPT, sampling, EngineOptions()).text

    def have_both_worked() -> bool:
        with ThreadPoolExecutor(6) as threads:
            posts = [
                threads.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60.0) for _ in range(6)
            ]
            texts = {post.result().raise_for_status().json()["choices"][0]["text"] for post in posts}
        assert texts == {expected}
        tokens = _metric(url, "sage_moe_engine_generated_tokens_total")
        return all(tokens[router] > 0 for router in ("0", "1"))

    _wait_until(have_both_worked)


def test_answers_whose_router_is_killed_go_on_with_the_same_tokens(url: str) -> None:
    """Each answer is in one of two routers. One is killed: the other goes on with its answers. Then both, while every
    answer is in the one that is left: they wait for the next processes of either."""
    max_tokens = 150
    undisturbed = [stream.answer() for stream in _run_streams(url, max_tokens)]
    assert all(len(answer[0]) == max_tokens for answer in undisturbed)  # type: ignore[arg-type]
    before = _status(url)["routers"]

    def kill_one() -> None:
        _kill(before[0]["pid"])

    one_killed = [stream.answer() for stream in _run_streams(url, max_tokens, kill_one)]
    assert one_killed == undisturbed
    resumed = _metric(url, "sage_moe_requests_resumed_total")[""]
    assert resumed > 0

    def kill_both() -> None:
        _kill(*(each["pid"] for each in _status(url)["routers"] if "pid" in each))

    both_killed = [stream.answer() for stream in _run_streams(url, max_tokens, kill_both)]
    assert both_killed == undisturbed
    assert _metric(url, "sage_moe_requests_resumed_total")[""] >= resumed + NUM_STREAMS
    assert _metric(url, "sage_moe_requests_not_resumed_total")[""] == 0
    _wait_until(lambda: [each["state"] for each in _status(url)["routers"]] == ["ready"] * 2)
    assert not {each["pid"] for each in _status(url)["routers"]} & {each["pid"] for each in before}
    assert httpx.get(f"{url}/ready", timeout=30.0).status_code == 200


@pytest.mark.slow  # half a minute in which nothing happens: a router is left only after its patience
def test_answers_leave_a_router_that_hangs(url: str) -> None:
    max_tokens = 150
    undisturbed = [stream.answer() for stream in _run_streams(url, max_tokens)]
    victim = _status(url)["routers"][0]["pid"]
    stopped = [
        stream.answer() for stream in _run_streams(url, max_tokens, lambda: os.kill(victim, signal.SIGSTOP))
    ]
    assert stopped == undisturbed
    _wait_until(lambda: _status(url)["routers"][0].get("pid") not in (None, victim))
