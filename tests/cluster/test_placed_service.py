"""A service that is placed on machines by what these are: the second one has no store, and comes and goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.local.generate import generate
from router.loading import EngineOptions
from tests.running_cluster import HEAD, WORKER, RunningCluster, running_head
from tests.started_command import TIMEOUT_S, started

pytestmark = pytest.mark.ray

NEXT_WORKER = "127.0.0.4"
PROMPT = "Once upon a time there was a king"
NUM_EXPERTS = 384
HIDE = 'mount -t tmpfs none "$0" && exec "$@"'
"""In a mount namespace of its own: what is at that path for all others is not there."""


@dataclass
class Placed:
    cluster: RunningCluster
    store: Path
    folder: Path

    @contextmanager
    def joined(self, address: str) -> Iterator[Any]:
        """A machine that does not have the store, with a cache of its own."""
        cache = self.folder / f"cache-{address}"
        options = ("--node-address", address, "--num-cpus", "1", "--store-cache", str(cache))
        command = self.cluster.command("join", self.cluster.head, *options)
        hidden = ["unshare", "-m", "sh", "-c", HIDE, str(self.store), *command]
        log = self.folder / f"join-{address}.log"
        with started(hidden, self.cluster.environment, "has joined", log) as process:
            yield process

    def options(self, port: int) -> list[str]:
        """The head has memory for some experts, the others for all."""
        config = self.folder / "serve.yaml"
        cache = self.folder / "cache-of-the-service"
        budgets = {HEAD: "6MiB", WORKER: "40MiB", NEXT_WORKER: "40MiB"}
        config.write_text(yaml.safe_dump({"node-budgets": budgets, "store-cache": str(cache)}))
        more = ("--address", self.cluster.head, "--port", str(port), "--no-trust", "--max-num-seqs", "1")
        return ["serve", str(self.store), "--config", str(config), *more, "--served-model-name", "stories"]

    @contextmanager
    def served(self, port: int, log: Path) -> Iterator[Service]:
        command = self.cluster.command(*self.options(port))
        with started(command, self.cluster.environment, " is served at ", log):
            yield Service(f"http://127.0.0.1:{port}", log)


@dataclass
class Service:
    url: str
    log: Path

    def tell(self, **more: Any) -> str:
        body = {"model": "stories", "prompt": PROMPT, "temperature": 0, "max_tokens": 24} | more
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = httpx.get(f"{self.url}/sage/status", timeout=TIMEOUT_S).json()
        return told

    def actors(self, node: str) -> list[dict[str, Any]]:
        entries = self.status()["actors"]
        return [entry for entry in entries if entry.get("node") == node and entry["state"] == "ready"]

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_reached():
            assert time.monotonic() < deadline, json.dumps(self.status(), indent=1)[:20_000]
            time.sleep(0.2)


@pytest.fixture(scope="module")
def placed(stories_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Placed]:
    probe = tmp_path_factory.mktemp("probe")
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(probe)]
    done = subprocess.run(tried, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"a mount namespace is not permitted: {done.stderr.strip()}")
    folder = tmp_path_factory.mktemp("placed")
    with running_head(folder) as cluster:
        yield Placed(cluster, stories_store, folder)


@pytest.fixture(scope="module")
def expected(stories_store: Path) -> str:
    return generate(stories_store, PROMPT, {"temperature": 0.0, "max_tokens": 24}, EngineOptions()).text


def test_service_follows_the_machines_and_keeps_its_tokens(
    placed: Placed, expected: str, free_port: int, tmp_path: Path
) -> None:
    with placed.joined(WORKER) as worker:
        _sync_ahead(placed)
        dry = placed.cluster.run(*placed.options(free_port), "--dry-run", "--json")
        assert dry.returncode == 0, dry.stderr
        decided = json.loads(dry.stdout)["placement"]
        near, far = decided["nodes"]
        assert (near["has_store"], far["has_store"]) == (True, False)
        assert far["room_bytes"] == 40 * 2**20
        (actor,) = [actor for actor in far["actors"] if not actor["is_replica"]]
        sent = decided["groups"][actor["group"]]["experts"]
        kept = decided["router_experts"]
        assert sum(map(len, kept.values())) + sum(map(len, sent.values())) == NUM_EXPERTS
        assert 0 < sum(map(len, kept.values())) * 73_728 <= 6 * 2**20

        with placed.served(free_port, tmp_path / "serve.log") as service:
            assert f"node {WORKER}" not in service.log.read_text()
            assert actor["actor"] in service.log.read_text()
            assert service.tell() == expected
            (entry,) = service.actors(WORKER)
            assert entry["group"] == sum(map(len, sent.values()))
            assert entry["store"]["is_cache"]
            assert str(placed.folder / f"cache-{WORKER}") in entry["store"]["folder"]
            assert entry["store"]["fetched_bytes"] == {}, "all was there ahead of time"
            assert entry["store"]["records_done"] >= entry["group"]

            os.kill(entry["pid"], signal.SIGKILL)
            assert service.tell() == expected
            service.wait_until(lambda: [a["pid"] for a in service.actors(WORKER)] not in ([], [entry["pid"]]))
            assert service.tell() == expected

            worker.send_signal(signal.SIGINT)
            assert service.tell() == expected
            service.wait_until(lambda: _reasons(service, "was lost"))
            service.wait_until(lambda: bool(service.status()["cluster"]["pending"]))
            assert service.tell() == expected

            with placed.joined(NEXT_WORKER):
                service.wait_until(lambda: len(service.actors(NEXT_WORKER)) == 1)
                service.wait_until(lambda: not service.status()["cluster"]["pending"])
                assert service.actors(NEXT_WORKER)[0]["group"] == entry["group"]
                assert service.tell() == expected


def _sync_ahead(placed: Placed) -> None:
    folder = placed.folder / "cache-of-the-service"
    command = ("store", "sync", str(placed.store), "--address", placed.cluster.head, "--to", str(folder))
    done = placed.cluster.run(*command, "--json")
    assert done.returncode == 0, done.stderr
    nodes = {node["address"]: node for node in json.loads(done.stdout)["nodes"]}
    assert nodes[HEAD]["records_total"] == 0, "it has the store"
    assert nodes[WORKER]["records_done"] == NUM_EXPERTS
    assert nodes[WORKER]["folder"].startswith(str(placed.folder / f"cache-{WORKER}"))


def _reasons(service: Service, words: str) -> bool:
    return any(words in decision["reason"] for decision in service.status()["cluster"]["decisions"])
