"""The head of a cluster dies with all that runs on it, in the middle of an answer: the command ends, what was learned
is in its ledger, and a service that is started anew answers as before."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.processes import end_processes
from tests.running_cluster import RunningCluster, running_head
from tests.started_command import TIMEOUT_S, started

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

PROMPT = "Once upon a time there was a king who had three daughters"
BODY = {"model": "stories", "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
FAIL_FAST_S = 30.0
"""Half of the minute after which Ray itself would give up; usually it takes some three seconds."""


@contextmanager
def _served(cluster: RunningCluster, store: Path, port: int, folder: Path, log: Path) -> Iterator[Any]:
    options = ("--address", cluster.head, "--port", str(port), "--actors", "1", "--state-dir", str(folder))
    command = cluster.command("serve", str(store), *options, "--served-model-name", "stories")
    with started(command, cluster.environment, " is served at ", log) as process:
        yield process


def _tell(port: int) -> str:
    url = f"http://127.0.0.1:{port}/v1/completions"
    answer = httpx.post(url, json=BODY | {"max_tokens": 32}, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def _tokens_learned(cluster: RunningCluster, store: Path, folder: Path) -> int:
    done = cluster.run("store", "trust", "show", str(store), "--json", "--state-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["tokens"])


def _lines_until_head_is_killed(port: int, head: psutil.Process) -> list[str]:
    """A stream's lines, as far as they come. Its head is killed, with all its children, when it has begun."""
    lines: list[str] = []
    body = BODY | {"max_tokens": 400, "stream": True}
    with httpx.stream(
        "POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=TIMEOUT_S
    ) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) == 8:
                end_processes([head, *head.children(recursive=True)], 0.0)
    return lines


def test_service_whose_head_is_lost_ends_and_has_what_it_learned_when_it_is_started_again(
    stories_store: Path, free_port: int, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    log = tmp_path / "serve.log"
    with (
        running_head(tmp_path) as cluster,
        _served(cluster, stories_store, free_port, state, log) as process,
    ):
        before = _tell(free_port)
        deadline = time.monotonic() + TIMEOUT_S
        while not (learned := _tokens_learned(cluster, stories_store, state)):
            assert time.monotonic() < deadline, "nothing was learned"
            time.sleep(0.5)
        with pytest.raises(httpx.TransportError):
            _lines_until_head_is_killed(free_port, psutil.Process(cluster.pid))
        assert process.wait(FAIL_FAST_S) == 1
        assert f"error: the Ray cluster's head at {cluster.head} is lost" in log.read_text()
        assert _tokens_learned(cluster, stories_store, state) >= learned
    with (
        running_head(tmp_path) as cluster,
        _served(cluster, stories_store, free_port, state, tmp_path / "again.log"),
    ):
        assert _tell(free_port) == before
        status = httpx.get(f"http://127.0.0.1:{free_port}/sage/status", timeout=TIMEOUT_S).json()
        assert status["routers"][0]["trust"]["tokens"] >= learned
