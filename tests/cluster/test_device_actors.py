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

from cluster.demand import uniform_demand
from cluster.node_report import StoreQuestion
from cluster.node_rooms import RoomRules
from cluster.node_speed import ExpertShape
from cluster.placement import PlacementOptions, place, plan_local
from cluster.plan import CardShare, ServicePlan
from cluster.service_spec import Placing
from cluster.supervisor import start_supervisor, stop_supervisor
from cluster.topology import Gpu, NodeFacts, Topology
from experts.budget import ExpertBytes
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from router.loading import EngineOptions
from router.model_config import read_model_config
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


@pytest.fixture
def supervisor(stories_store: Path, plan: ServicePlan) -> Iterator[Any]:
    with ray_nodes(1, num_gpus=(1,), setup_hook="tests.simulated_actors.install"):
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


def _placing(root: Path, nodes: list[str]) -> Placing:
    """The routers' machine, one with a card, and one without; each of the latter has room for all experts."""
    store = ExpertStore.open(root)
    config = read_model_config(store.served.config)
    sizes = {key: store.record(key).nbytes for key in store.expert_keys(store.served.name)}
    question = StoreQuestion(str(root), store.hash, ExpertShape(), ())
    store.close()
    total, largest = sum(sizes.values()), max(sizes.values())
    here, card, plain = (
        NodeFacts(node, "127.0.0.1", room, 1, 1e9, 1e9, 1e-4, has_store=True)
        for node, room in zip(nodes, (8 * largest, total, total), strict=True)
    )
    card = replace(card, gpus=(Gpu("one", total),), behind_bytes=16 * largest)
    here = replace(here, bandwidth_bytes_s=float("inf"), round_trip_s=0.0)
    demand = uniform_demand(sizes, config.experts_per_token, 2 * config.hidden_size)
    rules = RoomRules(ExpertBytes(total, largest), 0, 8 * largest, expert_device="auto")
    topology = Topology((here, card, plain), nodes[0])
    return Placing(topology, demand, PlacementOptions(replicas=1), rules, question)


def test_actors_are_on_cards_where_machines_have_them_and_move_to_them(stories_store: Path) -> None:
    with ray_nodes(3, num_gpus=(0, 1, 0), setup_hook="tests.simulated_actors.install") as (cluster, nodes):
        placing = _placing(stories_store, nodes)
        plan = place(placing.topology, placing.demand, None, placing.options)
        spec = service_spec(stories_store, plan, placing=placing, expert_device="cuda")
        supervisor = start_supervisor(spec, nodes[0])
        try:
            ray.get(supervisor.wait_ready.remote(WAIT_S), timeout=WAIT_S)
            loaded = open_engine(
                stories_store,
                EngineOptions(expert_budget_bytes=plan.router_budget_bytes),
                patient_directory,
            )
            assert run_to_end(loaded.engine, [greedy("r")]).reasons == {"r": "length"}
            kinds = {e["node_id"]: e["numerics_class"].split("/")[0] for e in _by_name(supervisor).values()}
            assert kinds == {nodes[1][:12]: DEVICE.type, nodes[2][:12]: "cpu"}
            assert 0 < loaded.directory.foreign_rows < loaded.directory.stats().remote_rows

            (lost,) = (node for node in cluster.worker_nodes if node.node_id == nodes[2])
            cluster.remove_node(lost, allow_graceful=True)
            while [e.get("node_id") for e in _by_name(supervisor).values()] != [nodes[1][:12]] * 2:
                assert run_to_end(loaded.engine, [greedy("r")]).reasons == {"r": "length"}
            wait_settled(supervisor)
            entries = _by_name(supervisor).values()
            assert {e["numerics_class"].split("/")[0] for e in entries} == {DEVICE.type}
            host_bytes = sum(e["behind"]["budget_bytes"] for e in entries)
            assert host_bytes <= placing.topology.node(nodes[1]).behind_bytes
            assert run_to_end(loaded.engine, [greedy("r")]).reasons == {"r": "length"}
            loaded.close()
        finally:
            stop_supervisor()
