"""A Ray cluster that runs already: a head and a machine that joins it, each with an address of its own, and a service
that comes and goes. All of it by the commands that users type."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.head_probe import Answer, probe_head
from cluster.ray_token import Token
from gateway.local.generate import generate
from router.loading import EngineOptions
from tests.running_cluster import HEAD, WORKER, RunningCluster, running_head
from tests.started_command import TIMEOUT_S, started

pytestmark = pytest.mark.ray

PROMPT = "Once upon a time there was a king"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running_head(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(head: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """With a second node, which leaves at the end as on Ctrl-C."""
    log = tmp_path_factory.mktemp("join") / "log"
    options = ("--node-address", WORKER, "--num-cpus", "1", "--labels", "disk=nvme")
    command = head.command("join", head.head, *options)
    with started(command, head.environment, "has joined", log) as process:
        yield head
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    assert head.nodes() == {HEAD}


@contextmanager
def _service(cluster: RunningCluster, store: Path, port: int, log: Path) -> Iterator[Any]:
    options = ("--address", cluster.head, "--port", str(port), "--actors", "2", "--no-trust")
    command = cluster.command("serve", str(store), *options, "--served-model-name", "stories")
    with started(command, cluster.environment, " is served at ", log) as process:
        yield process


def test_stranger_s_calls_are_refused_by_the_joined_cluster(cluster: RunningCluster) -> None:
    assert cluster.nodes() == {HEAD, WORKER}
    facts = probe_head(cluster.head, Token("wrong", "a test"))
    assert (facts.without_token, facts.with_token) == (Answer.REFUSED, Answer.REFUSED)
    joining = cluster.run("join", cluster.head, RAY_AUTH_TOKEN="wrong")
    assert joining.returncode == 1
    assert "the token of RAY_AUTH_TOKEN is not the cluster's: copy " in joining.stderr
    assert joining.stderr.count("\n") == 1


def test_service_answers_on_a_running_cluster_is_the_only_one_and_leaves_the_cluster_as_it_was(
    cluster: RunningCluster, stories_store: Path, free_port: int, tmp_path: Path
) -> None:
    before = cluster.actors()
    with _service(cluster, stories_store, free_port, tmp_path / "serve.log") as process:
        body = {"model": "stories", "prompt": PROMPT, "temperature": 0, "max_tokens": 16}
        answer = httpx.post(f"http://127.0.0.1:{free_port}/v1/completions", json=body, timeout=60.0)
        expected = generate(stories_store, PROMPT, {"temperature": 0.0, "max_tokens": 16}, EngineOptions())
        assert answer.json()["choices"][0]["text"] == expected.text
        assert httpx.get(f"http://127.0.0.1:{free_port}/-/routes", timeout=30.0).status_code == 404, (
            "unguarded"
        )
        assert "supervisor" in cluster.actors()

        examined = cluster.run("doctor", cluster.head, "--store", str(stories_store), "--json")
        _check_examination(examined, free_port)

        second = cluster.run("serve", str(stories_store), "--address", cluster.head, "--port", str(free_port))
        assert second.returncode == 1
        assert "error: a service runs on this Ray cluster already (stories at http" in second.stderr

        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0, (tmp_path / "serve.log").read_text()
    assert cluster.actors() == before
    assert cluster.nodes() == {HEAD, WORKER}


def _check_examination(examined: subprocess.CompletedProcess[str], port: int) -> None:
    assert examined.returncode == 0, examined.stdout + examined.stderr
    found = json.loads(examined.stdout)
    assert [(node["address"], node["is_head"], node["is_here"]) for node in found["nodes"]] == [
        (HEAD, True, True),
        (WORKER, False, False),
    ]
    near, far = found["nodes"]
    assert near["link"] is None and far["link"]["bandwidth_bytes_s"] > 0
    assert far["labels"]["disk"] == "nvme"
    assert near["arithmetic"]["digest"] == far["arithmetic"]["digest"]
    assert near["has_store"] and far["has_store"]
    findings = [finding["what"] for finding in found["findings"]]
    assert any(f"a service runs: stories at http://127.0.0.1:{port}" in what for what in findings)
