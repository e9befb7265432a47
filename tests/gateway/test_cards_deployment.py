"""The whole service with expert actors on a card, which Ray counts and which is simulated in the actors' processes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from experts.budget import BudgetRequest
from experts.node_memory import NodeMemory
from gateway.demo.ports import free_port
from gateway.operations.status_view import render_status
from gateway.service import memory as service_memory
from gateway.service.launch import ServiceOptions, running_service
from tests.simulated_device import DEVICE

pytestmark = pytest.mark.ray

BODY: dict[str, Any] = {
    "model": "stories",
    "prompt": "Once upon a time there was a king",
    "temperature": 0.0,
    "max_tokens": 40,
}
HOST_BUDGET = BudgetRequest(num_bytes=24 << 20)


@pytest.fixture
def url(stories_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    counted = functools.partial(
        ray.init, num_gpus=1, runtime_env={"worker_process_setup_hook": "tests.simulated_actors.install"}
    )
    monkeypatch.setattr(ray, "init", counted)
    monkeypatch.setattr(service_memory, "read_cards", lambda: (NodeMemory(4 << 30, 3 << 30),))
    port = free_port()
    options = ServiceOptions(
        stories_store,
        "stories",
        port=port,
        num_actors=2,
        num_cpus=2,
        expert_device="cuda",
        host_budgets=(HOST_BUDGET,),
    )
    with running_service(options):
        yield f"http://127.0.0.1:{port}"


def test_service_with_actors_on_a_card_answers_and_tells_both_tiers(url: str) -> None:
    texts = {
        httpx.post(f"{url}/v1/completions", json=BODY, timeout=120.0)
        .raise_for_status()
        .json()["choices"][0]["text"]
        for _ in range(2)
    }
    assert len(texts) == 1
    status = httpx.get(f"{url}/sage/status", timeout=60.0).raise_for_status().json()
    calls = status["router"]["expert_calls"]
    assert (calls["foreign_rows"], calls["local_rows"]) == (calls["remote_rows"], 0)
    rows = {(row["process"], row["tier"]): row for row in status["memory"]["processes"]}
    for actor in status["actors"]:
        assert actor["numerics_class"].startswith(f"{DEVICE.type}/")
        assert actor["budget_bytes"] == rows[actor["name"], "device"]["budget_bytes"]
        assert actor["behind"]["budget_bytes"] == rows[actor["name"], "host"]["budget_bytes"]
    assert sum(row["budget_bytes"] for (_, tier), row in rows.items() if tier != "device") == 24 << 20
    assert {entry["gpus"] for entry in status["cluster"]["plan"]["actors"]} == {0.5}
    metrics = httpx.get(f"{url}/metrics", timeout=60.0).text
    assert 'sage_moe_resident_bytes{actor="experts-0"' in metrics and 'tier="host"' in metrics
    assert render_status(status | {"routers": [status["router"] | {"name": "router", "state": "ready"}]})
