"""The supervisor on a Ray of two nodes: what is planned runs where it is planned, whatever is changed or killed, and
a client that streams meanwhile gets the same tokens."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.placement import plan_local
from cluster.plan import ActorPlan, ServicePlan
from cluster.ray_directory import RayDirectory
from cluster.resources import NAMESPACE
from cluster.supervisor import start_supervisor, stop_supervisor
from cluster.supervisor_handle import find_supervisor
from experts.store import ExpertStore
from router.loading import EngineOptions, LoadedEngine
from tests.engines import open_engine, run_to_end
from tests.ray_nodes import (
    WAIT_S,
    Stream,
    greedy,
    patient_directory,
    pids,
    ray_nodes,
    service_spec,
    states,
    wait_settled,
)

pytestmark = pytest.mark.ray


@dataclass
class Running:
    """A service of two groups, one on each node, and a router connected to it."""

    cluster: Cluster
    supervisor: Any
    plan: ServicePlan
    nodes: list[str]
    loaded: LoadedEngine
    directory: RayDirectory
    expected: list[int]

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = ray.get(self.supervisor.status.remote(), timeout=WAIT_S)
        return told

    def apply(self, plan: ServicePlan) -> None:
        ray.get(self.supervisor.apply.remote(plan), timeout=WAIT_S)

    def wait_connected(self, *names: str) -> None:
        _wait_until(lambda: self.directory.remote.connected() == set(names))

    def stream(self) -> Stream:
        return Stream(self.loaded)

    def is_unharmed(self, stream: Stream) -> bool:
        """Every answer is the expected one, and no call found its actor gone."""
        return not stream.errors and all(answer == self.expected for answer in stream.answers)


def _wait_until(is_reached: Callable[[], bool]) -> None:
    """A supervisor that is being restarted has not reached anything yet."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with suppress(ray.exceptions.RayError):
            if is_reached():
                return
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def service(stories_store: Path) -> Iterator[Running]:
    store = ExpertStore.open(stories_store)
    keys = store.expert_keys(store.served.name)
    store.close()
    local = open_engine(stories_store, EngineOptions())
    expected = run_to_end(local.engine, [greedy("alone")]).tokens["alone"]
    local.close()
    with ray_nodes(2) as (cluster, nodes):
        plan = plan_local(keys, 2)
        plan = replace(
            plan,
            actors=tuple(
                replace(actor, node_id=node) for actor, node in zip(plan.actors, nodes, strict=True)
            ),
        )
        supervisor = start_supervisor(service_spec(stories_store, plan, is_local_only=False))
        try:
            assert not ray.get(supervisor.is_begun.remote(), timeout=WAIT_S), "actors take seconds to start"
            directories: list[RayDirectory] = []

            def connect(worker: Any) -> RayDirectory:
                directories.append(patient_directory(worker))
                return directories[0]

            loaded = open_engine(stories_store, EngineOptions(), connect)
            assert ray.get(supervisor.is_begun.remote(), timeout=WAIT_S), "a router waits for them"
            yield Running(cluster, supervisor, plan, nodes, loaded, directories[0], expected)
            loaded.close()
        finally:
            stop_supervisor()


@pytest.fixture(autouse=True)
def as_planned(service: Running) -> Iterator[None]:
    """Every test begins with the first plan, connected."""
    service.apply(service.plan)
    wait_settled(service.supervisor)
    _wait_until(lambda: len(service.directory.remote.connected()) == 2)
    yield


def test_actors_run_on_the_nodes_of_the_plan(service: Running) -> None:
    entries = service.status()["actors"]
    assert [(entry["name"], entry["node_id"]) for entry in entries] == [
        ("experts-0", service.nodes[0][:12]),
        ("experts-1", service.nodes[1][:12]),
    ]
    assert [(entry["group_name"], entry["replica"], entry["state"]) for entry in entries] == [
        ("experts-0", 0, "ready"),
        ("experts-1", 0, "ready"),
    ]


def test_restarted_supervisor_adopts_what_runs_and_remembers_the_plan(service: Running) -> None:
    grown = replace(
        service.plan,
        actors=(*service.plan.actors, ActorPlan("replica", "experts-0", service.nodes[1])),
    )
    service.apply(grown)
    wait_settled(service.supervisor)
    before = service.status()["actors"]
    pid = ray.get(service.supervisor.pid.remote(), timeout=WAIT_S)
    os.kill(pid, signal.SIGKILL)
    _wait_until(lambda: _pid(service.supervisor) not in (None, pid))
    assert ray.get(service.supervisor.is_begun.remote(), timeout=WAIT_S), "routers need not wait again"
    wait_settled(service.supervisor)
    after = service.status()["actors"]
    assert pids(after) == pids(before)
    assert len(pids(after)) == 3
    assert [entry["incarnation"] for entry in after] == [entry["incarnation"] for entry in before]


def _pid(supervisor: Any) -> int | None:
    try:
        return int(ray.get(supervisor.pid.remote(), timeout=10.0))
    except (ray.exceptions.RayError, TimeoutError):
        return None


def test_group_moves_to_another_node_while_a_client_streams(service: Running) -> None:
    moved = replace(
        service.plan,
        actors=tuple(replace(actor, node_id=service.nodes[1]) for actor in service.plan.actors),
    )
    with service.stream() as stream:
        service.apply(moved)
        wait_settled(service.supervisor)
    entries = service.status()["actors"]
    assert {entry["node_id"] for entry in entries} == {service.nodes[1][:12]}
    assert service.is_unharmed(stream)
    assert service.loaded.directory.stats().failovers == 0


def test_rolling_restart_replaces_every_actor_while_a_client_streams(service: Running) -> None:
    before = service.status()["actors"]
    with service.stream() as stream:
        ray.get(service.supervisor.roll.remote(), timeout=WAIT_S)
        wait_settled(service.supervisor)
    after = service.status()["actors"]
    assert pids(before).isdisjoint(pids(after))
    assert min(entry["incarnation"] for entry in after) > max(entry["incarnation"] for entry in before)
    assert service.is_unharmed(stream)
    assert service.loaded.directory.stats().failovers == 0


def test_service_goes_down_to_no_actor_and_comes_back_while_a_client_streams(service: Running) -> None:
    with service.stream() as stream:
        service.apply(replace(service.plan, actors=()))
        wait_settled(service.supervisor)
        assert service.status()["actors"] == []
        service.wait_connected()
        service.apply(service.plan)
        wait_settled(service.supervisor)
        _wait_until(lambda: len(service.directory.remote.connected()) == 2)
    assert service.is_unharmed(stream)
    assert service.loaded.directory.stats().failovers == 0


def test_actor_that_computes_what_is_wrong_is_replaced(service: Running) -> None:
    bad = service.status()["actors"][0]
    wrong = service.supervisor.report_bad.remote(bad["name"], bad["incarnation"] - 1, "of an earlier one")
    ray.get(wrong, timeout=WAIT_S)
    assert states(service.status())[bad["name"]] == "ready"
    told = service.supervisor.report_bad.remote(bad["name"], bad["incarnation"], "rows of NaN")
    ray.get(told, timeout=WAIT_S)
    wait_settled(service.supervisor)
    status = service.status()
    assert bad["pid"] not in pids(status["actors"])
    assert status["quarantines"] == {service.nodes[0]: 1}
    assert ("quarantine", "rows of NaN") in [(d["kind"], d["reason"]) for d in status["decisions"]]


def test_hung_actor_does_not_hold_up_the_replacement_of_a_dead_one_and_is_replaced_itself(
    service: Running,
) -> None:
    hung, dead = service.status()["actors"]
    process = psutil.Process(hung["pid"])
    process.suspend()
    os.kill(dead["pid"], signal.SIGKILL)

    def is_dead_one_replaced() -> bool:
        entry = service.status()["actors"][-1]
        return bool(entry["state"] == "ready" and entry.get("pid") not in (None, dead["pid"]))

    _wait_until(is_dead_one_replaced)
    _wait_until(lambda: not {hung["pid"], dead["pid"]} & pids(service.status()["actors"]))
    wait_settled(service.supervisor)
    _wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    reasons = [d["reason"] for d in service.status()["decisions"] if d["kind"] == "end"]
    assert any("silent for" in reason for reason in reasons)


def test_actor_that_fits_no_node_waits_for_a_machine_and_keeps_nobody_from_serving(service: Running) -> None:
    giant = ActorPlan("giant", "experts-0", None, 2**50)
    service.apply(replace(service.plan, actors=(*service.plan.actors, giant)))
    _wait_until(lambda: service.status()["pending"] != [])
    status = service.status()
    assert [(entry["actor"], entry["memory_bytes"]) for entry in status["pending"]] == [("giant", 2**50)]
    assert states(status) == {"experts-0": "ready", "experts-1": "ready", "giant": "starting"}
    outcome = run_to_end(service.loaded.engine, [greedy("beside")])
    assert outcome.tokens["beside"] == service.expected
    service.apply(service.plan)
    wait_settled(service.supervisor)
    assert service.status()["pending"] == []


def test_actors_of_a_lost_node_go_to_one_that_is_left(service: Running) -> None:
    """Almost the last one: it takes a node away, and maybe the supervisor with it, which Ray then restarts."""
    (worker,) = service.cluster.worker_nodes
    with service.stream() as stream:
        service.cluster.remove_node(worker, allow_graceful=False)
        _wait_until(lambda: _runs_on(service) == {service.nodes[0][:12]})
        wait_settled(service.supervisor)
        _wait_until(lambda: len(service.directory.remote.connected()) == 2)
    assert service.is_unharmed(stream)


def _runs_on(service: Running) -> set[str]:
    entries = service.status()["actors"]
    return {entry["node_id"] for entry in entries if entry["state"] == "ready" and len(entries) == 2}


def test_stopped_service_leaves_no_actor_behind(service: Running) -> None:
    """The last one: it stops what the others use."""
    stop_supervisor()
    _wait_until(
        lambda: not [entry for entry in ray.util.list_named_actors(True) if entry["namespace"] == NAMESPACE]
    )
    with pytest.raises(Exception, match="no supervisor"):
        find_supervisor()
