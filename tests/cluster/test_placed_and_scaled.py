"""A service that is placed on three machines and follows the load: demand brings a second actor, idleness takes all
away, a request brings them back where they are at home, and a machine is lost; the tokens stay the same."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.actor_counts import ScalerSettings
from cluster.capacity import Load
from cluster.demand import uniform_demand
from cluster.node_report import ExpertShape, StoreQuestion
from cluster.node_rooms import RoomRules
from cluster.placement import PlacementOptions, place
from cluster.plan import ServicePlan
from cluster.ray_directory import RayDirectory
from cluster.router_book import RouterLoad
from cluster.service_spec import Placing, Scaling
from cluster.supervisor import start_supervisor, stop_supervisor
from cluster.topology import NodeFacts, Topology
from experts.budget import ExpertBytes
from experts.store import ExpertStore
from router.expert_use import ExpertUse
from router.loading import EngineOptions, LoadedEngine
from router.model_config import read_model_config
from tests.engines import open_engine, run_to_end
from tests.ray_nodes import WAIT_S, Stream, greedy, patient_directory, pids, ray_nodes, service_spec

pytestmark = pytest.mark.ray

ROUTER_ROOM, ROOM = 40, 250
"""In experts, of 384: a machine has room for its own group, and for a part of the other one's."""
WAITING = "waiting"
SETTINGS = ScalerSettings(
    max_actors=3,
    max_replicas=2,
    high_busy=1e-4,  # whatever is asked for is busy
    low_busy=5e-5,
    rise_after_s=0.5,
    cold_after_s=4.0,
    fall_after_s=6.0,
    cool_down_s=1.0,
)


Ready = dict[str, list[str]]
"""Group -> the nodes where it has an actor that is ready, shortened as status does."""


@dataclass
class Running:
    cluster: Cluster
    supervisor: Any
    plan: ServicePlan
    """As it was placed."""
    loaded: LoadedEngine
    directory: RayDirectory
    expected: list[int]
    expert_bytes: int
    num_open: int = 0
    """Requests."""

    def report_load(self) -> None:
        """From now on; the number of actors stays what it is before."""
        use = ExpertUse(self.loaded.store.served.name, self.loaded.config.num_experts)
        self.loaded.engine.watchers = (*self.loaded.engine.watchers, use)
        self.directory.report_load(lambda: RouterLoad(Load(self.num_open, 0, 8), use.take()))

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = ray.get(self.supervisor.status.remote(), timeout=WAIT_S)
        return told

    def homes(self) -> Ready:
        return {group.name: [str(group.home)[:12]] for group in self.plan.groups}

    def budgets(self) -> dict[str, dict[str, int]]:
        """Node or WAITING -> group -> bytes that its actor there may keep, as planned now."""
        plan: ServicePlan = ray.get(self.supervisor.plan.remote(), timeout=WAIT_S)
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for actor in plan.actors:
            assert actor.budget_bytes is not None
            found[(actor.node_id or WAITING)[:12]][actor.group] = actor.budget_bytes
        return found

    def lose(self, node: str) -> None:
        """A machine, named as by status."""
        (lost,) = (found for found in self.cluster.worker_nodes if found.node_id.startswith(node))
        self.cluster.remove_node(lost, allow_graceful=True)

    def wait_until(self, is_reached: Callable[[Ready], bool]) -> dict[str, Any]:
        """The status in which it is."""
        deadline = time.monotonic() + WAIT_S
        while not is_reached(_ready(told := self.status())):
            assert time.monotonic() < deadline, told
            time.sleep(0.1)
        return told

    def under_load(
        self, is_reached: Callable[[Ready], bool]
    ) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
        """A client asks again and again until something is reached, and gets what it always gets. Returns the status
        and the budgets of that moment: once nobody asks, actors go."""
        self.num_open = 4
        with Stream(self.loaded) as stream:
            reached = self.wait_until(is_reached), self.budgets()
        self.num_open = 0
        assert not stream.errors
        assert all(answer == self.expected for answer in stream.answers)
        return reached


def _ready(told: Mapping[str, Any]) -> Ready:
    nodes: Ready = defaultdict(list)
    for entry in told["actors"]:
        if entry["state"] == "ready":
            nodes[entry["group_name"]].append(entry["node_id"])
    return nodes


def _topology(nodes: list[str], expert_bytes: int) -> Topology:
    """The router's machine first. All have the store."""
    facts = (
        NodeFacts(
            node,
            "127.0.0.1",
            expert_bytes * (ROOM if number else ROUTER_ROOM),
            1,
            1e9,
            1e9 if number else float("inf"),
            1e-4 if number else 0.0,
            has_store=True,
        )
        for number, node in enumerate(nodes)
    )
    return Topology(tuple(facts), nodes[0])


def _placing(root: Path, nodes: list[str]) -> Placing:
    store = ExpertStore.open(root)
    config = read_model_config(store.served.config)
    sizes = {key: store.record(key).nbytes for key in store.expert_keys(store.served.name)}
    digest = store.hash
    store.close()
    largest = max(sizes.values())
    rules = RoomRules(ExpertBytes(sum(sizes.values()), largest), 0, ROUTER_ROOM * largest)
    shape = ExpertShape(config.hidden_size, config.expert_width, "bfloat16")
    demand = uniform_demand(sizes, config.experts_per_token, 2 * config.hidden_size)
    options = PlacementOptions(replicas=1)
    question = StoreQuestion(str(root), digest, shape, ())
    return Placing(_topology(nodes, largest), demand, options, rules, question)


@pytest.fixture
def service(stories_store: Path) -> Iterator[Running]:
    local = open_engine(stories_store, EngineOptions())
    expected = run_to_end(local.engine, [greedy("alone")]).tokens["alone"]
    local.close()
    with ray_nodes(3) as (cluster, nodes):
        placing = _placing(stories_store, nodes)
        plan = place(placing.topology, placing.demand, None, placing.options)
        scaling = Scaling(SETTINGS, placing.demand.largest_bytes, interval_s=0.5)
        spec = service_spec(stories_store, plan, placing=placing, scaling=scaling)
        supervisor = start_supervisor(spec, nodes[0])
        try:
            ray.get(supervisor.wait_ready.remote(WAIT_S), timeout=WAIT_S)
            directories: list[RayDirectory] = []

            def connect(worker: Any) -> RayDirectory:
                directories.append(patient_directory(worker))
                return directories[0]

            options = EngineOptions(expert_budget_bytes=plan.router_budget_bytes)
            loaded = open_engine(stories_store, options, connect)
            largest = placing.demand.largest_bytes
            running = Running(cluster, supervisor, plan, loaded, directories[0], expected, largest)
            yield running
            loaded.close()
        finally:
            stop_supervisor()


def test_placed_service_follows_load_and_machines_with_the_same_tokens(service: Running) -> None:
    homes, room_bytes = service.homes(), ROOM * service.expert_bytes
    assert len(homes) == 2 and service.plan.router_keys
    service.wait_until(lambda ready: ready == homes)
    service.report_load()

    # Demand: a second actor for a group, in what room the other's machine has left.
    told, budgets = service.under_load(lambda ready: sorted(map(len, ready.values())) == [1, 2])
    both = sorted(node for (node,) in homes.values())
    assert both in [sorted(nodes) for nodes in _ready(told).values()]
    assert all(sum(found.values()) <= room_bytes for found in budgets.values())
    first = pids(told["actors"])

    # Idleness: no actor.
    service.wait_until(lambda _: not service.status()["actors"])
    service.wait_until(lambda _: not service.directory.remote.connected())
    kinds = Counter(decision["kind"] for decision in service.status()["decisions"])
    assert kinds["replicate"] >= 1 and kinds["drain"] >= 3

    # A request: every group comes back to its machine.
    told, _ = service.under_load(
        lambda ready: all(set(home) <= set(ready[name]) for name, home in homes.items())
    )
    assert first and first.isdisjoint(pids(told["actors"]))

    # A machine is lost: what ran there moves to the one that is left, within its room.
    lost, left = both
    service.lose(lost)
    told, budgets = service.under_load(lambda ready: ready == {name: [left] for name in homes})
    assert sum(budgets[left].values()) <= room_bytes
    assert budgets.keys() <= {left, WAITING}, "a second actor waits for a machine"
    assert any(f"node {lost} was lost" in decision["reason"] for decision in told["decisions"])
