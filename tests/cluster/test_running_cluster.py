"""A Ray cluster that runs already: a head and a machine that joins it, each with an address of its own, and a service
that comes and goes. All of it by the commands that users type."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

from cluster.head_probe import Answer, probe_head
from cluster.ray_token import Token
from cluster.resources import LOCAL_ONLY
from gateway.generate import generate
from router.loading import EngineOptions
from tests.started_command import REPOSITORY, TIMEOUT_S, started

pytestmark = pytest.mark.ray

SCRIPTS = Path(sys.executable).parent
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
"""Both are this machine's loopback; to Ray they are two machines."""
PROMPT = "Once upon a time there was a king"


@dataclass(frozen=True)
class RunningCluster:
    head: str
    token: Token
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "gateway.cli", *arguments]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=REPOSITORY,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def nodes(self) -> set[str]:
        """Addresses of the nodes that Ray counts as alive."""
        request = gcs_service_pb2.GetAllNodeInfoRequest()
        reply = self._ask(gcs_service_pb2_grpc.NodeInfoGcsServiceStub, "GetAllNodeInfo", request)
        return {
            node.node_manager_address
            for node in reply.node_info_list
            if node.state == gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE
        }

    def actors(self) -> set[str]:
        """Names of the actors that live."""
        request = gcs_service_pb2.GetAllActorInfoRequest()
        reply = self._ask(gcs_service_pb2_grpc.ActorInfoGcsServiceStub, "GetAllActorInfo", request)
        return {
            actor.name
            for actor in reply.actor_table_data
            if actor.state != gcs_pb2.ActorTableData.ActorState.DEAD
        }

    def _ask(self, stub: Any, method: str, request: Any) -> Any:
        with grpc.insecure_channel(self.head) as channel:
            metadata = (("authorization", f"Bearer {self.token.value}"),)
            return getattr(stub(channel), method)(request, timeout=10.0, metadata=metadata)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((HEAD, 0))) for _ in range(2)]
        port, client = (probe.getsockname()[1] for probe in probes)
    # What tests set for Ray to stay on 127.0.0.1 would keep a second node from joining.
    environment = {name: value for name, value in os.environ.items() if name not in LOCAL_ONLY} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(REPOSITORY),
        "SAGE_MOE_CACHE": str(folder / "cache"),
    }
    temporary = f"/tmp/sage-{secrets.token_hex(4)}"  # short: sockets lie in it
    options = (
        f"--head --block --node-ip-address={HEAD} --port={port} --num-cpus=1 --include-dashboard=false "
        f"--dashboard-agent-listen-port=0 --ray-client-server-port={client} --min-worker-port=0 "
        f"--max-worker-port=0 --object-store-memory={80 * 2**20} --temp-dir={temporary}"
    )
    command = [str(SCRIPTS / "ray"), "start", *options.split()]
    try:
        with started(command, environment, "Ray runtime started", folder / "head.log"):
            del environment["RAY_AUTH_MODE"]  # our commands find out by themselves
            yield RunningCluster(f"{HEAD}:{port}", Token(token.read_text(), str(token)), environment)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    assert joining.stderr.startswith("error: the token of RAY_AUTH_TOKEN is not the cluster's: copy ")
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
