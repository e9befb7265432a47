"""Machines that Ray's autoscaler may add: each is a raylet of its own on this machine's loopback address.

Ray's fake provider with one thing more: a machine has the memory that its type says, which expert actors ask for. Ray
loads it by name in the head's monitor process.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import RESOURCES_ENVIRONMENT_VARIABLE
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.processes import end_processes
from gateway.demo.ports import free_port

REPOSITORY = Path(__file__).parent.parent.parent
HEAD_TYPE, WORKER_TYPE = "ray.head.default", "worker"
OBJECT_STORE_BYTES = 80 * 2**20
START_TIMEOUT_S = 120.0
MARK = "SAGE_MOE_TEST_CLUSTER"
"""In the environment of all that belongs to a head."""


class FakeMachines(FakeMultiNodeProvider):
    """Starts and ends raylets as Ray's autoscaler asks for machines."""

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        for _ in range(count):
            with self.lock:
                self._start_machine(tags, resources)

    def _start_machine(self, tags: dict[str, str], resources: dict[str, float]) -> None:
        node_id: str = self._next_hex_node_id()  # type: ignore[no-untyped-call]
        environment = {
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
            "RAY_CLOUD_INSTANCE_ID": node_id,
            "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
            RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(resources),
        }
        parameters = RayParams(
            gcs_address=self._gcs_address,
            redis_address=self._gcs_address,
            num_cpus=int(resources["CPU"]),
            memory=resources["memory"],
            object_store_memory=OBJECT_STORE_BYTES,
            min_worker_port=0,
            max_worker_port=0,
            dashboard_agent_listen_port=0,
            env_vars=environment,
        )
        node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
        known = {
            TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
            TAG_RAY_NODE_NAME: node_id,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
        machines: dict[str, Any] = self._nodes
        machines[node_id] = {"tags": known | tags, "node": node}


def _configuration(port: int, head_bytes: int, machine_bytes: int) -> dict[str, Any]:
    module = f"{FakeMachines.__module__}.{FakeMachines.__qualname__}"
    lists = (
        "cluster_synced_files",
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    )
    return {
        "cluster_name": "fake",
        "max_workers": 1,
        "idle_timeout_minutes": 0.25,
        "provider": {
            "type": "external",
            "module": module,
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,  # they all have the same address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 1, "memory": head_bytes}, "node_config": {}, "max_workers": 0},
            WORKER_TYPE: {
                "resources": {"CPU": 1, "memory": machine_bytes},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 1,
            },
        },
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
        "auth": {},
        **{name: [] for name in lists},
    }


@contextmanager
def autoscaled_ray(folder: Path, head_bytes: int, machine_bytes: int) -> Iterator[str]:
    """A head on loopback whose autoscaler may add one machine, and takes it away when it was idle for 15 seconds.

    head_bytes, machine_bytes: memory that Ray counts there. Yields the head's address. What is ended at the end is what
    was started here, and nothing else: `ray.cluster_utils.AutoscalingCluster` ends every Ray of the user.
    """
    port = free_port()
    configuration = folder / "autoscaling.json"
    configuration.write_text(json.dumps(_configuration(port, head_bytes, machine_bytes)))
    temporary = f"/tmp/sage-{secrets.token_hex(4)}"  # short: sockets lie in it
    options = (
        f"--head --block --node-ip-address=127.0.0.1 --port={port} --num-cpus=1 --memory={head_bytes} "
        f"--object-store-memory={OBJECT_STORE_BYTES} --autoscaling-config={configuration} "
        f"--include-dashboard=false --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 "
        f"--temp-dir={temporary}"
    )
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        MARK: temporary,
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", *options.split()]
    process = _started(command, environment, folder / "head.log")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        _end(process)
        end_processes(_marked(temporary), 0.0)
        shutil.rmtree(temporary, ignore_errors=True)


def _started(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A head that has started. Ray gives one half a minute, which a busy machine may not keep: so up to three times."""
    for _ in range(3):
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            if "Ray runtime started" in log.read_text():
                return process
            time.sleep(0.05)
        _end(process)
    raise AssertionError(log.read_text())


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        end_processes(family, 0.0)
    process.wait()


def _marked(temporary: str) -> list[psutil.Process]:
    """What an ended head has left behind: agents of a node that failed outlive it, and are nobody's children."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == temporary:
                found.append(process)
    return found
