"""A service whose number of actors follows the load, as a user starts it: down to none when it is idle, and back."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.local.generate import generate
from router.loading import EngineOptions
from tests.started_command import REPOSITORY, TIMEOUT_S, started

pytestmark = pytest.mark.ray

PROMPT = "Once upon a time there was a king"
BODY = {"model": "stories", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}


@dataclass
class Service:
    url: str

    def tell(self) -> str:
        answer = httpx.post(f"{self.url}/v1/completions", json=BODY, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def status(self) -> Any:
        return httpx.get(f"{self.url}/sage/status", timeout=TIMEOUT_S).raise_for_status().json()

    def pids(self) -> set[int]:
        return {
            actor["pid"] for actor in self.status()["actors"] if actor["state"] == "ready" and "pid" in actor
        }

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 2 * TIMEOUT_S
        while not is_reached():
            assert time.monotonic() < deadline, json.dumps(self.status(), indent=1)[:20_000]
            time.sleep(0.5)


@pytest.fixture
def service(stories_store: Path, free_port: int, tmp_path: Path) -> Iterator[Service]:
    options = ("--port", str(free_port), "--served-model-name", "stories", "--no-trust", "--actors", "2")
    command = [sys.executable, "-m", "gateway.cli", "serve", str(stories_store), *options, "--autoscale"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with started(command, environment, " is served at ", tmp_path / "serve.log"):
        yield Service(f"http://127.0.0.1:{free_port}")


def test_service_that_rests_has_no_actor_and_answers_the_same_when_it_is_asked_again(
    service: Service, stories_store: Path
) -> None:
    sampling = {"temperature": 0.0, "max_tokens": 24}
    expected = generate(stories_store, PROMPT, sampling, EngineOptions()).text
    assert service.tell() == expected
    before = service.pids()
    assert len(before) == 2
    service.wait_until(lambda: not service.status()["actors"])
    status = service.status()["cluster"]
    assert status["capacity"] == "rest"
    assert {d["reason"] for d in status["decisions"] if d["kind"] == "drain"} == {
        "the service is idle (REST)"
    }
    assert service.tell() == expected, "by the router, which has every expert on its disk"
    service.wait_until(lambda: len(service.pids()) == 2)
    assert before.isdisjoint(service.pids())
    assert service.tell() == expected
    assert {actor["last_error"] for actor in service.status()["actors"]} == {""}
