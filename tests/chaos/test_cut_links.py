"""A service on three machines with addresses of their own, which are network namespaces, and a cable that is pulled out
of one of them in the middle of an answer."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.resources import LOCAL_ONLY
from tests.chaos.hosts import Host, hosts
from tests.chaos.service_under_fire import wait_for
from tests.chaos.trials import MODEL, Answer, read_answer
from tests.started_command import REPOSITORY, started

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

SCRIPTS = Path(sys.executable).parent
HEAD_PORT, HTTP_PORT = 6379, 8000
"""In namespaces of our own every port is free."""
MAX_TOKENS = 120
CUT_S = 3.0


@dataclass(frozen=True)
class Machines:
    head: Host
    workers: dict[str, Host]
    """By address."""
    url: str

    def read(self, at_token: int = 0, deed: Callable[[], None] = lambda: None) -> Answer:
        """On the head. deed: what is done once that many tokens have come."""
        is_done = False
        answer = Answer()
        for answer in read_answer(self.url, 0, 0, MAX_TOKENS):
            if len(answer.tokens) >= at_token and not is_done:
                is_done = True
                deed()
        return answer

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = httpx.get(f"{self.url}/sage/status", timeout=30.0).raise_for_status().json()
        return told

    def actors_compute_all(self, expected: Answer) -> bool:
        """Whether another answer, the expected one again, comes from them alone."""
        before = self.status()["router"]["expert_calls"]["local_rows"]
        assert self.read().content() == expected.content()
        return bool(self.status()["router"]["expert_calls"]["local_rows"] == before)

    def wait_whole(self) -> list[dict[str, Any]]:
        """Until both actors are ready and connected; as the status tells of them."""

        def look() -> list[dict[str, Any]]:
            status = self.status()
            ready = [a for a in status["actors"] if a["state"] == "ready" and "pid" in a]
            is_whole = status["router"]["connected_actors"] == len(ready) == len(status["actors"]) == 2
            return ready if is_whole else []

        return list(wait_for(look))


@pytest.fixture(scope="module")
def machines(stories_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if name not in LOCAL_ONLY} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(REPOSITORY),
        "SAGE_MOE_CACHE": str(folder / "cache"),
        "RAY_health_check_failure_threshold": "100",  # what is shown here goes before Ray gives a machine up
    }
    temporary = f"/tmp/sage-{secrets.token_hex(4)}"  # short: sockets lie in it
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        head, *workers = stack.enter_context(hosts(3))

        def start(host: Host, sign: str, *words: str) -> None:
            log = folder / f"{host.name}-{words[1]}.log"
            stack.enter_context(started(host.command(words), environment, sign, log))

        start(
            head,
            "Ray runtime started",
            *(str(SCRIPTS / "ray"), "start", "--head", "--block", f"--node-ip-address={head.address}"),
            *(f"--port={HEAD_PORT}", "--num-cpus=1", "--include-dashboard=false", f"--temp-dir={temporary}"),
            f"--object-store-memory={80 * 2**20}",
        )
        cli = (sys.executable, "-m", "gateway.cli")
        address = f"{head.address}:{HEAD_PORT}"
        for worker in workers:
            options = ("--node-address", worker.address, "--num-cpus", "1")
            start(worker, "has joined", *cli, "join", address, *options)
        options = ("--address", address, "--port", str(HTTP_PORT), "--actors", "2", "--no-trust")
        start(
            head, " is served at ", *cli, "serve", str(stories_store), *options, "--served-model-name", MODEL
        )
        yield Machines(head, {w.address: w for w in workers}, f"http://127.0.0.1:{HTTP_PORT}")


def test_answer_goes_on_when_a_machine_is_cut_off_and_the_machine_comes_back(machines: Machines) -> None:
    machines.head.run(lambda: _cut_and_heal(machines))


def _cut_and_heal(machines: Machines) -> None:
    actors = machines.wait_whole()
    assert {actor["node"] for actor in actors} <= machines.workers.keys(), "an actor beside the router"
    undisturbed = machines.read()
    assert len(undisturbed.tokens) == MAX_TOKENS, undisturbed.error
    before = machines.status()["router"]["expert_calls"]["failovers_by_kind"]["silent"]
    lost = machines.workers[actors[0]["node"]]
    cut_at_s = time.monotonic()
    try:
        cut = machines.read(MAX_TOKENS // 4, lost.cut)
        assert cut.content() == undisturbed.content()
        calls = machines.status()["router"]["expert_calls"]
        assert calls["failovers_by_kind"]["silent"] > before, calls
        assert machines.read().content() == undisturbed.content()
        time.sleep(max(0.0, cut_at_s + CUT_S - time.monotonic()))
    finally:
        lost.heal()
    machines.wait_whole()
    wait_for(lambda: machines.actors_compute_all(undisturbed))


def test_actors_behind_a_cut_link_are_replaced_before_ray_gives_their_machine_up(machines: Machines) -> None:
    machines.head.run(lambda: _cut_until_replaced(machines))


def _cut_until_replaced(machines: Machines) -> None:
    actors = machines.wait_whole()
    undisturbed = machines.read()
    lost = machines.workers[actors[0]["node"]]
    lost_pids = [actor["pid"] for actor in actors if actor["node"] == lost.address]
    try:
        assert machines.read(MAX_TOKENS // 4, lost.cut).content() == undisturbed.content()

        def replaced() -> bool:
            there = machines.wait_whole()
            return all(actor["node"] != lost.address for actor in there)

        wait_for(replaced)
        states = {node["address"]: node["state"] for node in machines.status()["nodes"]}
        assert states[lost.address] == "alive", "Ray has given it up; the supervisor was to be quicker"
        wait_for(lambda: machines.actors_compute_all(undisturbed))
    finally:
        lost.heal()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in lost_pids))
    machines.wait_whole()
    assert machines.read().content() == undisturbed.content()
