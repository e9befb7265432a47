"""The supervisor with expert actors on a card: Ray counts cards, and the device is simulated in the actors' processes.

What they compute is compared with a router's own device: the same tokens whatever is killed, rolled or resized.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.placement import plan_local
from cluster.plan import CardShare, ServicePlan
from cluster.supervisor import start_supervisor, stop_supervisor
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from router.loading import EngineOptions
from tests.engines import open_engine, run_to_end
from tests.ray_nodes import (
    WAIT_S,
    greedy,
    patient_directory,
    ray_nodes,
    service_spec,
    states,
    wait_settled,
)
from tests.simulated_device import DEVICE, simulated

pytestmark = pytest.mark.ray
SHARE = CardShare(0.5, 1 << 20)
BUDGET_BYTES = 4 << 20


def _status(supervisor: Any) -> dict[str, Any]:
    told: dict[str, Any] = ray.get(supervisor.status.remote(), timeout=WAIT_S)
    return told


def _by_name(supervisor: Any) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in _status(supervisor)["actors"]}


@pytest.fixture(scope="module")
def plan(stories_store: Path) -> ServicePlan:
    store = ExpertStore.open(stories_store)
    keys = store.expert_keys(store.served.name)
    store.close()
    return plan_local(keys, 2, (BUDGET_BYTES, BUDGET_BYTES), SHARE)


@pytest.fixture(scope="module")
def supervisor(stories_store: Path, plan: ServicePlan) -> Iterator[Any]:
    with ray_nodes(1, num_gpus=1, setup_hook="tests.simulated_actors.install"):
        started = start_supervisor(service_spec(stories_store, plan, expert_device="cuda"))
        try:
            ray.get(started.wait_ready.remote(), timeout=WAIT_S)
            yield started
        finally:
            stop_supervisor()


def test_actors_that_share_a_card_give_a_router_s_bits_through_kills_replacements_and_resizing(
    stories_store: Path, supervisor: Any, plan: ServicePlan
) -> None:
    with simulated():
        options = EngineOptions(device=DEVICE)
        alone = open_engine(stories_store, options)
        expected = run_to_end(alone.engine, [greedy("r")]).tokens
        alone.close()

        def connect(worker: ExpertWorker) -> Any:
            return patient_directory(worker)

        loaded = open_engine(stories_store, options, connect)
        directory = loaded.directory

        def ask() -> int:
            before = directory.stats().remote_rows
            assert run_to_end(loaded.engine, [greedy("r")]).tokens == expected
            return directory.stats().remote_rows - before

        assert ask() > 0
        first = _by_name(supervisor)
        for entry in first.values():
            assert entry["numerics_class"] == loaded.worker.numerics_class
            assert 0 < entry["resident_bytes"] <= BUDGET_BYTES
            assert 0 < entry["behind"]["resident_bytes"] <= SHARE.host_budget_bytes

        os.kill(first["experts-0"]["pid"], signal.SIGKILL)
        ask()
        wait_settled(supervisor)
        replaced = _by_name(supervisor)
        assert len(replaced) == 2
        assert {e["pid"] for e in replaced.values()} != {e["pid"] for e in first.values()}

        ray.get(supervisor.roll.remote(), timeout=WAIT_S)
        ask()
        wait_settled(supervisor)
        rolled = _by_name(supervisor)
        assert {e["pid"] for e in rolled.values()}.isdisjoint(e["pid"] for e in replaced.values())
        assert set(states(_status(supervisor)).values()) == {"ready"}

        small = tuple(replace(actor, budget_bytes=BUDGET_BYTES // 4) for actor in plan.actors)
        ray.get(supervisor.apply.remote(replace(plan, actors=small)), timeout=WAIT_S)
        while any(e["budget_bytes"] > BUDGET_BYTES // 4 for e in _by_name(supervisor).values()):
            ask()
        assert _by_name(supervisor).keys() == rolled.keys(), "told, and not replaced"
        ask()
        assert directory.foreign_rows == 0
        loaded.close()
