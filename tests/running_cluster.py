"""A Ray cluster that runs already, as users type it: a head with an address of its own, and machines that join it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

from cluster.ray_token import Token
from cluster.resources import LOCAL_ONLY
from gateway.demo.ports import free_port
from tests.started_command import REPOSITORY, TIMEOUT_S, started

SCRIPTS = Path(sys.executable).parent
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
"""Both are this machine's loopback; to Ray they are two machines."""


@dataclass(frozen=True)
class RunningCluster:
    head: str
    token: Token
    environment: dict[str, str]
    pid: int
    """Of the head, the parent of all that runs on its machine."""

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


@contextmanager
def running_head(folder: Path) -> Iterator[RunningCluster]:
    """A head whose Ray is closed by a token, without other nodes. folder: for its files."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    port, client = free_port(HEAD), free_port(HEAD)
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
        with started(command, environment, "Ray runtime started", folder / "head.log") as process:
            del environment["RAY_AUTH_MODE"]  # our commands find out by themselves
            known = Token(token.read_text(), str(token))
            yield RunningCluster(f"{HEAD}:{port}", known, environment, process.pid)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
