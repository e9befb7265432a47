"""The whole service on a Ray with two CPUs: HTTP, Serve, the router and two expert actors, as users meet it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from cluster.memory_pressure import ROUTER_SCORE, SCORE_FILE
from cluster.resources import NAMESPACE
from cluster.supervisor_handle import find_supervisor
from experts.budget import FIT, BudgetRequest
from experts.errors import LedgerBusy
from experts.store import ExpertStore
from experts.trust_ledger import TrustLedger, ledger_path, read_ledger
from gateway.demo.ports import free_port
from gateway.local.generate import generate
from gateway.operations.status_command import fetch_status
from gateway.operations.watch_state import WatchState, answered
from gateway.operations.watch_view import watch_line
from gateway.service.launch import ServiceOptions, running_service
from gateway.service.state_folder import resolve_state_folder
from router.loading import EngineOptions
from router.trust_session import trust_identity

pytestmark = pytest.mark.ray

MODEL = "stories"
EXPERT_BYTES = 73728
NUM_EXPERTS = 384
NODE_BUDGET_BYTES = 60 * EXPERT_BYTES
"""Of 384 experts: every step needs waves, in the actors and, when one is lost, in the router."""
PROMPT = "Once upon a time there was a king who had three daughters"
GREEDY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 48}
RECOVERY_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Service:
    url: str

    def status(self) -> Any:
        return httpx.get(f"{self.url}/sage/status", timeout=30.0).raise_for_status().json()

    def post(self, body: dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60.0)


@pytest.fixture(scope="module")
def service(stories_store: Path) -> Iterator[Service]:
    port = free_port()
    options = ServiceOptions(
        stories_store,
        MODEL,
        port=port,
        num_actors=2,
        num_cpus=2,
        expert_budgets=(FIT,),
        node_budgets={"127.0.0.1": BudgetRequest(num_bytes=NODE_BUDGET_BYTES)},
    )
    with running_service(options):
        yield Service(f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def expected(stories_store: Path) -> Callable[..., str]:
    """The text that the same engine writes in this process, without Ray, HTTP or actors."""

    def text(max_tokens: int, **sampling: Any) -> str:
        chosen = {"temperature": 0.0, "max_tokens": max_tokens} | sampling
        return generate(stories_store, PROMPT, chosen, EngineOptions()).text

    return text


def _wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RECOVERY_TIMEOUT_S
    while not is_reached():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.1)


def _stream_text(service: Service, body: dict[str, Any], on_chunk: Callable[[int], None]) -> str:
    """The streamed text; on_chunk is called with the number of each chunk as it arrives."""
    pieces: list[str] = []
    request = body | {"stream": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=request, timeout=60.0) as response:
        for line in response.raise_for_status().iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                pieces += [choice["text"] for choice in event["choices"]]
                on_chunk(len(pieces))
    return "".join(pieces)


def test_actors_router_and_gateway_all_start_on_two_cpus(service: Service) -> None:
    status = service.status()
    assert [actor["name"] for actor in status["actors"]] == ["experts-0", "experts-1"]
    for actor in status["actors"]:
        assert actor.keys() >= {"name", "pid", "node", "group", "state", "resident_bytes"}
        assert actor["state"] == "ready"
    pids = {status["router"]["pid"], *(actor["pid"] for actor in status["actors"]), os.getpid()}
    assert len(pids) == 4
    if Path(SCORE_FILE.format(pid="self")).exists():
        victims = [_oom_score(actor["pid"]) for actor in status["actors"]]
        assert _oom_score(status["router"]["pid"]) == ROUTER_SCORE < min(victims)
    assert [node["cpus"] for node in status["nodes"]] == [2.0]


def _oom_score(pid: int) -> int:
    return int(Path(SCORE_FILE.format(pid=pid)).read_text())


def test_status_is_shown_once_and_again_and_again(service: Service) -> None:
    answer = fetch_status(service.url, {}, 30.0)  # raises where either view cannot show it
    first = answered(WatchState(), answer, 0.0, "")
    line = watch_line(answered(first, service.status(), 1.0, ""), "now")
    assert "routers=1/1 actors=2/2 nodes=1" in line and "tokens_per_s=0.0" in line
    assert _metric(service, "sage_moe_expert_actors") == len(answer["actors"])
    assert _metric(service, "sage_moe_expert_actors_pending") == 0


def test_actors_and_router_share_the_node_s_budget_and_keep_to_it(
    service: Service, expected: Callable[..., str]
) -> None:
    assert service.post(GREEDY).json()["choices"][0]["text"] == expected(48)
    status = service.status()
    processes = [status["router"]["experts"], *status["actors"]]
    assert sum(process["budget_bytes"] for process in processes) == NODE_BUDGET_BYTES
    for process in processes:
        assert process["resident_bytes"] <= process["budget_bytes"]
    planned = {row["process"]: row["budget_bytes"] for row in status["memory"]["processes"]}
    assert planned == {process["name"]: process["budget_bytes"] for process in processes}
    assert _metric(service, "sage_moe_budget_bytes") == NODE_BUDGET_BYTES
    assert _metric(service, "sage_moe_resident_bytes") <= NODE_BUDGET_BYTES


def test_ray_is_closed_to_who_does_not_know_its_token_or_comes_from_elsewhere(service: Service) -> None:
    address = ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    stranger = "import sys, ray._raylet as r; r.GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)"
    outcome = subprocess.run(
        [sys.executable, "-c", stranger, address],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert outcome.returncode != 0
    assert "InvalidAuthToken" in outcome.stderr


def test_official_client_gets_exactly_the_text_of_a_local_run(
    service: Service, expected: Callable[..., str]
) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]
    plain = client.completions.create(**GREEDY)
    assert plain.choices[0].text == expected(48)
    assert plain.choices[0].finish_reason == "length"
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 48
    streamed = list(client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == expected(48)
    assert streamed[-1].usage == plain.usage
    sampled = client.completions.create(**GREEDY | {"temperature": 0.9}, seed=5, extra_body={"top_k": 40})
    assert sampled.choices[0].text == expected(48, temperature=0.9, seed=5, top_k=40)


def test_official_client_chats_plain_and_streamed(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0)
    question: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 24,
        "temperature": 0,
    }
    plain = client.chat.completions.create(**question)
    streamed = list(client.chat.completions.create(**question, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == plain.choices[0].message.content
    assert text
    assert streamed[-1].choices[0].finish_reason == plain.choices[0].finish_reason == "length"


def test_many_requests_at_once_get_the_answers_they_get_alone(service: Service) -> None:
    bodies = [
        GREEDY | {"prompt": f"{number} wolves", "max_tokens": 12, "seed": number} for number in range(16)
    ]
    alone = [service.post(body).json()["choices"][0]["text"] for body in bodies]

    async def together() -> list[str]:
        async with httpx.AsyncClient(timeout=60.0) as client:
            calls = [client.post(f"{service.url}/v1/completions", json=body) for body in bodies]
            return [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == alone


def test_bad_request_names_the_field_and_its_range(service: Service) -> None:
    answer = service.post(GREEDY | {"temperature": 7})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "temperature"
    assert "from 0 to 2" in error["message"]
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_client_that_leaves_frees_its_memory_and_stops_its_computation(service: Service) -> None:
    body = GREEDY | {"max_tokens": 1500, "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60.0) as response:
        lines = response.iter_lines()  # kept: to forget it would close the connection
        next(lines)
        assert service.status()["requests"]["running"] == 1
    _wait_until(lambda: service.status()["requests"]["running"] == 0)
    before = service.status()["requests"]["generated_tokens"]
    time.sleep(0.5)
    assert service.status()["requests"]["generated_tokens"] == before
    assert _metric(service, "sage_moe_kv_used_bytes") == 0


def _metric(service: Service, name: str) -> float:
    text = httpx.get(f"{service.url}/metrics", timeout=30.0).raise_for_status().text
    samples = [
        s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == name
    ]
    assert samples, f"no metric {name}"
    return sum(samples)


def test_metrics_name_tokens_memory_and_hops(service: Service) -> None:
    before = _metric(service, "sage_moe_completion_tokens_total")
    service.post(GREEDY | {"max_tokens": 7})
    assert _metric(service, "sage_moe_completion_tokens_total") == before + 7
    assert _metric(service, "sage_moe_expert_remote_rows_total") > 0
    assert _metric(service, "sage_moe_hop_seconds_total") > 0
    assert _metric(service, "sage_moe_resident_bytes") > 0
    assert _metric(service, "sage_moe_time_to_first_token_seconds_count") > 0


def test_supervisor_keeps_what_the_router_learns(service: Service, stories_store: Path) -> None:
    service.post(GREEDY | {"max_tokens": 20})
    assert service.status()["router"]["trust"]["is_kept"]
    store = ExpertStore.open(stories_store)
    identity = trust_identity(store)
    store.close()
    path = ledger_path(resolve_state_folder(), identity.store_hash)
    with pytest.raises(LedgerBusy):
        TrustLedger(path, identity)
    _wait_until(lambda: read_ledger(path, identity).num_tokens > 0)
    assert read_ledger(path, identity).counts_ALE.any()


def test_expert_actors_are_told_what_was_learned(service: Service) -> None:
    service.post(GREEDY | {"max_tokens": 20})
    actors = [ray.get_actor(f"experts-{index}", namespace=NAMESPACE) for index in range(2)]
    _wait_until(lambda: all(ray.get(actor.status.remote())["experts_trusted"] > 0 for actor in actors))


def test_service_is_ready_when_idle_and_under_load(service: Service) -> None:
    assert httpx.get(f"{service.url}/ready", timeout=30.0).status_code == 200
    load = threading.Thread(target=service.post, args=(GREEDY | {"max_tokens": 300},))
    load.start()
    answers = [httpx.get(f"{service.url}/ready", timeout=30.0) for _ in range(10)]
    load.join()
    assert [answer.status_code for answer in answers] == [200] * 10


def test_supervisor_that_computes_nothing_runs_without_pytorch(service: Service) -> None:
    supervisor = find_supervisor()
    pids = (ray.get(supervisor.pid.remote()), service.status()["router"]["pid"])
    mapped = [Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for pid in pids]
    assert ["libtorch_cpu" in text for text in mapped] == [False, True]


def test_actors_give_memory_back_at_rest_and_take_it_again_under_load(
    service: Service, expected: Callable[..., str]
) -> None:
    """What a router tells the supervisor with `--capacity auto`, told here by a thread: REST takes a minute."""
    supervisor = find_supervisor()
    wish, is_done = [Fraction(1, NUM_EXPERTS // 4)], threading.Event()

    def keep_wishing() -> None:
        while not is_done.wait(0.5):
            version = ray.get(supervisor.roster.remote()).version
            ray.get(supervisor.roster.remote("test", version, wish[0]))

    wishing = threading.Thread(target=keep_wishing)
    budgets = {actor["name"]: actor["budget_bytes"] for actor in service.status()["actors"]}
    service.post(GREEDY)

    def actors_are(is_reached: Callable[[dict[str, Any]], bool]) -> Callable[[], bool]:
        return lambda: all(map(is_reached, service.status()["actors"]))

    wishing.start()
    try:
        _wait_until(actors_are(lambda actor: actor["resident_bytes"] <= 2 * EXPERT_BYTES))
        assert service.post(GREEDY).json()["choices"][0]["text"] == expected(48)
        assert actors_are(lambda actor: actor["resident_bytes"] <= 2 * EXPERT_BYTES)()
        wish[0] = Fraction(1)
        _wait_until(actors_are(lambda actor: actor["budget_bytes"] == budgets[actor["name"]]))
        assert service.post(GREEDY).json()["choices"][0]["text"] == expected(48)
        assert actors_are(lambda actor: actor["resident_bytes"] > budgets[actor["name"]] // 2)()
    finally:
        is_done.set()
        wishing.join()


@pytest.mark.chaos
def test_actor_killed_in_mid_answer_changes_no_token_and_comes_back(
    service: Service, expected: Callable[..., str]
) -> None:
    victim = service.status()["actors"][0]

    def kill_at_fifth(num_chunks: int) -> None:
        if num_chunks == 5:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim["pid"], signal.SIGKILL)

    text = _stream_text(service, GREEDY | {"max_tokens": 200}, kill_at_fifth)
    assert text == expected(200)
    assert service.status()["router"]["expert_calls"]["failovers"] > 0
    _wait_until(lambda: _has_recovered(service, victim))

    def do_actors_compute_all() -> bool:
        before = service.status()["router"]["expert_calls"]
        assert service.post(GREEDY).json()["choices"][0]["text"] == expected(48)
        after = service.status()["router"]["expert_calls"]
        return bool(
            after["remote_rows"] > before["remote_rows"] and after["local_rows"] == before["local_rows"]
        )

    _wait_until(do_actors_compute_all)


def _has_recovered(service: Service, victim: dict[str, Any]) -> bool:
    """A new process answers under the victim's name, and the router is connected to both actors again."""
    actors = {actor["name"]: actor for actor in service.status()["actors"]}
    again = actors[victim["name"]]
    is_new = again["state"] == "ready" and again.get("pid") not in (None, victim["pid"])
    return bool(is_new and service.status()["router"]["connected_actors"] == len(actors))
