"""Groups for which no machine has room: Ray's autoscaler adds one for them, and takes it away when nobody asks for them
any more. The client that asked meanwhile gets the same tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.actor_counts import ScalerSettings
from cluster.capacity import Load
from cluster.placement import plan_local
from cluster.ray_directory import RayDirectory
from cluster.resources import NAMESPACE
from cluster.router_book import RouterLoad
from cluster.service_spec import Scaling
from cluster.supervisor import start_supervisor, stop_supervisor
from experts.store import ExpertStore
from router.expert_use import ExpertUse
from router.loading import EngineOptions
from tests.cluster.fake_machines import autoscaled_ray
from tests.engines import open_engine, run_to_end
from tests.ray_nodes import Stream, greedy, patient_directory, service_spec

pytestmark = pytest.mark.ray
WAIT_S = 300.0
"""A machine is a Ray node that starts, on a busy machine."""


def _wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_reached():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.2)


def _machines() -> set[str]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in nodes if node["Alive"]}


def test_pending_group_brings_a_machine_and_its_idleness_takes_it_away(
    stories_store: Path, tmp_path: Path
) -> None:
    store = ExpertStore.open(stories_store)
    keys = store.expert_keys(store.served.name)
    expert_bytes = store.record(keys[0]).nbytes
    store.close()
    local = open_engine(stories_store, EngineOptions())
    expected = run_to_end(local.engine, [greedy("alone")]).tokens["alone"]
    local.close()
    group_bytes = len(keys) // 2 * expert_bytes
    plan = replace(plan_local(keys, 2, (group_bytes, group_bytes)), actors=())
    settings = ScalerSettings(2, cold_after_s=2.0, fall_after_s=4.0, cool_down_s=1.0)
    # The head has room for one group, and for less than an expert beside it.
    with autoscaled_ray(tmp_path, group_bytes + expert_bytes // 2, 2 * group_bytes) as address:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        try:
            scaling = Scaling(settings, expert_bytes)
            supervisor = start_supervisor(
                service_spec(stories_store, plan, is_local_only=False, scaling=scaling)
            )
            head = _machines()
            assert len(head) == 1

            def status() -> dict[str, Any]:
                told: dict[str, Any] = ray.get(supervisor.status.remote(), timeout=WAIT_S)
                return told

            def ready() -> int:
                return sum(entry["state"] == "ready" for entry in status()["actors"])

            directories: list[RayDirectory] = []

            def connect(worker: Any) -> RayDirectory:
                directories.append(patient_directory(worker))
                return directories[0]

            loaded = open_engine(stories_store, EngineOptions(), connect)
            use = ExpertUse(loaded.store.served.name, loaded.config.num_experts)
            loaded.engine.watchers = (*loaded.engine.watchers, use)
            directories[0].report_load(lambda: RouterLoad(Load(4, 0, 8), use.take()))
            with Stream(loaded) as stream:
                _wait_until(lambda: bool(status()["pending"]))
                _wait_until(lambda: ready() == 2)
                (added,) = _machines() - head
                _wait_until(lambda: len(directories[0].remote.connected()) == 2)
                told = status()
            assert not stream.errors and all(answer == expected for answer in stream.answers)
            assert {entry["node_id"] for entry in told["actors"]} == {name[:12] for name in (*head, added)}
            assert told["pending"] == []

            _wait_until(lambda: not status()["actors"])
            _wait_until(lambda: _machines() == head)
            decided = [d["kind"] for d in status()["decisions"] if d["kind"] in ("spawn", "drain")]
            # On a slow machine a group may look cold for a while, and be asked for again.
            assert decided.count("spawn") == decided.count("drain") >= 2

            with Stream(loaded) as stream:  # from no actor to one, where there is room for it
                _wait_until(lambda: ready() >= 1)
                _wait_until(lambda: bool(directories[0].remote.connected()))
            assert not stream.errors and all(answer == expected for answer in stream.answers)
            assert loaded.directory.stats().failovers == 0
            loaded.close()
        finally:
            stop_supervisor()
            ray.shutdown()
