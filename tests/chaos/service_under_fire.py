"""A whole service over HTTP on a Ray of several nodes, each with a raylet of its own, whose processes a test may kill.

Started by the code of `sage-moe serve --address`; routers, gateway and supervisor are on the head, expert actors on the
other nodes. `tests.chaos.failpoints` is in each of its processes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import ray
from ray.cluster_utils import Cluster

from cluster.plan import ActorPlan, ServicePlan
from cluster.processes import descendants, end_processes
from cluster.supervisor_handle import find_supervisor
from gateway.demo.ports import free_port
from gateway.service.launch import ServiceOptions, running_service
from tests.chaos.failpoints import VARIABLE
from tests.ray_nodes import add_node

REPOSITORY = Path(__file__).parent.parent.parent
IN_PROCESSES = Path(__file__).parent / "in_processes"
MODEL = "stories"
NUM_NODES, NUM_GROUPS, NUM_ROUTERS = 2, 2, 2
"""Nodes beside the head."""
WAIT_S = 240.0
LOOK_S = 0.1
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@dataclass
class ServiceUnderFire:
    url: str
    cluster: Cluster
    folder: Path
    """Of the failpoints."""
    supervisor: Any
    plan: ServicePlan

    def status(self) -> dict[str, Any] | None:
        """None while nobody answers."""
        try:
            told: dict[str, Any] = (
                httpx.get(f"{self.url}/sage/status", timeout=30.0).raise_for_status().json()
            )
        except httpx.HTTPError:
            return None
        return told

    def actors(self, state: str = "ready") -> list[dict[str, Any]]:
        """Those that have told their process, in the plan's order."""
        entries = (self.status() or {}).get("actors", [])
        return [entry for entry in entries if entry["state"] == state and "pid" in entry]

    def routers(self) -> list[dict[str, Any]]:
        return [r for r in (self.status() or {}).get("routers", []) if r["state"] == "ready"]

    def supervisor_pid(self) -> int:
        return int(self._ask("pid"))

    def nodes(self) -> list[str]:
        """Ray's ids of those beside the head."""
        return [node.node_id for node in self.cluster.worker_nodes]

    def apply(self, num_replicas: int, without: str = "") -> None:
        """Plan so many actors of each group, on different nodes. without: leave this one out."""
        nodes = self.nodes()
        actors = tuple(
            ActorPlan(f"{group.name}{'r' * replica}", group.name, nodes[(index + replica) % len(nodes)])
            for replica in range(num_replicas)
            for index, group in enumerate(self.plan.groups)
        )
        self.plan = replace(self.plan, actors=actors)
        kept = tuple(actor for actor in actors if actor.name != without)
        self._ask("apply", replace(self.plan, actors=kept))

    def _ask(self, method: str, *arguments: Any) -> Any:
        """A supervisor that is being restarted is asked again."""
        return wait_for(
            lambda: (ray.get(getattr(self.supervisor, method).remote(*arguments), timeout=20.0),)
        )[0]

    def settle(self) -> float:
        """Wait until what is planned runs, and all routers are there and connected to all of it. Seconds that took."""
        began_s = time.monotonic()
        num_actors = len(self.plan.actors)

        def is_whole() -> bool:
            status = self.status()
            if status is None or any(r["state"] != "ready" for r in status["routers"]):
                return False
            ready = [a for a in status["actors"] if a["state"] == "ready" and "pid" in a]
            is_connected = all(r["connected_actors"] == num_actors for r in status["routers"])
            return len(ready) == len(status["actors"]) == num_actors and is_connected

        wait_for(is_whole)
        return time.monotonic() - began_s

    def restore_node(self) -> None:
        """A new node in place of one whose raylet was killed."""
        for node in list(self.cluster.worker_nodes):
            if not node.any_processes_alive() or not node.remaining_processes_alive():
                self.cluster.remove_node(node, allow_graceful=False)
                add_node(self.cluster, **NODE)


def wait_for(look: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
    """Until it returns what is true. Errors of Ray are looks at a service that is being mended."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(ray.exceptions.RayError, TimeoutError):
            if found := look():
                return found
        assert time.monotonic() < deadline, f"not reached in {timeout_s:.0f} s"
        time.sleep(LOOK_S)


@contextmanager
def service_under_fire(store: Path) -> Iterator[ServiceUnderFire]:
    """With one actor of each group, settled."""
    with tempfile.TemporaryDirectory(prefix="sage-chaos-") as folder, _environment(Path(folder)):
        cluster = Cluster()
        try:
            for _ in range(1 + NUM_NODES):
                add_node(cluster, **NODE)
            with _serving(cluster, store, Path(folder)) as service:
                yield service
        finally:  # by ourselves: the cluster would first ask a head that is gone
            end_processes(descendants(), 0.0)


@contextmanager
def _serving(cluster: Cluster, store: Path, folder: Path) -> Iterator[ServiceUnderFire]:
    options = ServiceOptions(
        store,
        MODEL,
        port=free_port(),
        ray_address=cluster.address,
        num_actors=NUM_GROUPS,
        num_routers=NUM_ROUTERS,
        resume_timeout_s=int(WAIT_S),
        kv_budget_bytes=32 << 20,
        is_trust_learned=False,
    )
    with running_service(options) as url:
        supervisor = find_supervisor()
        plan = ray.get(supervisor.plan.remote(), timeout=WAIT_S)
        service = ServiceUnderFire(url, cluster, folder, supervisor, plan)
        service.apply(1)
        service.settle()
        yield service


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What Ray's processes inherit."""
    path = os.pathsep.join([str(IN_PROCESSES), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    changed = {VARIABLE: str(folder), "PYTHONPATH": path.rstrip(os.pathsep)}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
