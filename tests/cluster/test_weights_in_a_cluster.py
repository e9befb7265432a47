"""Weights on a Ray of three nodes, each with a store cache of its own and none with the store: from the head, from a
peer when the head's server is gone, and at hand when an actor is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.placement import plan_local
from cluster.plan import ActorPlan, ServicePlan
from cluster.ray_directory import RayDirectory
from cluster.resources import NAMESPACE
from cluster.supervisor import start_supervisor, stop_supervisor
from cluster.weight_keeper import start_keeper, stop_keeper
from experts.store import ExpertStore
from experts.store_source import STORE_CACHE_VARIABLE, CacheSpec, StoreSource
from extraction.manifest import ExpertKey
from router.loading import EngineOptions, LoadedEngine
from tests.deadlines import wait_until
from tests.engines import open_engine, run_to_end
from tests.ray_nodes import WAIT_S, greedy, patient_directory, ray_nodes, service_spec, wait_settled

pytestmark = pytest.mark.ray

Address = tuple[str, int]


@dataclass
class Running:
    supervisor: Any
    plan: ServicePlan
    nodes: list[str]
    head: Address
    caches: list[Path]
    loaded: LoadedEngine
    directory: RayDirectory
    expected: list[int]

    def apply(self, plan: ServicePlan) -> None:
        ray.get(self.supervisor.apply.remote(plan), timeout=WAIT_S)
        wait_settled(self.supervisor)

    def actors(self) -> dict[str, dict[str, Any]]:
        told = ray.get(self.supervisor.status.remote(), timeout=WAIT_S)
        return {entry["actor"]: entry for entry in told["actors"] if entry["state"] == "ready"}

    def store_of(self, actor: str) -> dict[str, Any]:
        """Of its machine, once all of its group is there."""

        def store() -> dict[str, Any]:
            told: dict[str, Any] = self.actors().get(actor, {}).get("store", {})
            return told

        wait_until(lambda: bool(store()) and store()["records_done"] == store()["records_total"], WAIT_S)
        return store()

    def tokens(self, name: str) -> list[int]:
        return run_to_end(self.loaded.engine, [greedy(name)]).tokens[name]

    def fallbacks(self, key: ExpertKey) -> tuple[str, ...]:
        """As the router knows them."""
        return tuple(self.directory.remote._links.view.fallbacks.get(key, ()))


@pytest.fixture(scope="module")
def service(stories_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = ExpertStore.open(stories_store)
    keys = store.expert_keys(store.served.name)
    record_bytes = {key: store.record(key).nbytes for key in keys}
    store_hash = store.hash
    store.close()
    local = open_engine(stories_store, EngineOptions())
    expected = run_to_end(local.engine, [greedy("alone")]).tokens["alone"]
    local.close()
    caches = [tmp_path_factory.mktemp("cache") for _ in range(3)]
    variables = [{STORE_CACHE_VARIABLE: str(cache)} for cache in caches]
    with ray_nodes(3, variables) as (_, nodes):
        plan = plan_local(keys, 2)
        placed = zip(plan.actors, nodes[1:], strict=True)
        plan = replace(plan, actors=tuple(replace(actor, node_id=node) for actor, node in placed))
        spec = service_spec(
            stories_store, plan, is_local_only=False, cache=CacheSpec("/absent"), record_bytes=record_bytes
        )
        head = start_keeper(str(stories_store), spec.secret, "")
        spec = replace(spec, store_source=StoreSource(store_hash, ("/absent",), head=head))
        supervisor = start_supervisor(spec, nodes[0])
        try:
            ray.get(supervisor.wait_ready.remote(), timeout=WAIT_S)
            directories: list[RayDirectory] = []

            def connect(worker: Any) -> RayDirectory:
                directories.append(patient_directory(worker))
                return directories[0]

            loaded = open_engine(stories_store, EngineOptions(), connect)
            yield Running(supervisor, plan, nodes, head, caches, loaded, directories[0], expected)
            loaded.close()
        finally:
            stop_supervisor()
            stop_keeper()


def _address(name: str) -> Address:
    actor = ray.get_actor(name, namespace=NAMESPACE)
    address: Address = ray.get(actor.weights_address.remote(), timeout=WAIT_S)
    return address


def test_machines_fetch_their_groups_from_the_head_into_their_own_folders(service: Running) -> None:
    assert service.tokens("fetching") == service.expected
    for actor, cache in zip(("experts-0", "experts-1"), service.caches[1:], strict=True):
        store = service.store_of(actor)
        assert store["folder"].startswith(str(cache))
        assert store["fetched_bytes"] == {f"{service.head[0]}:{service.head[1]}": store["bytes_total"]}
        assert store["records_total"] == len(service.plan.group(actor).keys)
    told = ray.get(service.supervisor.status.remote(), timeout=WAIT_S)
    assert told["disks"]["is_failover_safe"], "the head counts, whose store the routers read"
    assert service.tokens("fetched") == service.expected


def test_records_come_from_a_peer_when_the_head_s_server_is_gone(service: Running) -> None:
    """Follows the one before: there the first machine has fetched its group."""
    host, port = _address("experts-0")
    stop_keeper()
    replica = ActorPlan("replica", "experts-0", service.nodes[2])
    service.apply(replace(service.plan, actors=(*service.plan.actors, replica)))
    store = service.store_of("replica")
    assert store["fetched_bytes"] == {f"{host}:{port}": store["bytes_total"]}
    assert store["records_total"] == len(service.plan.group("experts-0").keys)
    wait_until(lambda: service.directory.remote.connected() == {"experts-0", "experts-1", "replica"}, WAIT_S)
    assert service.tokens("with a replica") == service.expected


def test_rows_of_a_lost_actor_go_to_who_has_its_records_on_disk(service: Running) -> None:
    """Follows the one before: there the second machine has fetched the first one's group, too."""
    service.apply(service.plan)
    key = service.plan.group("experts-0").keys[0]
    wait_until(lambda: service.fallbacks(key) == ("experts-1",), WAIT_S)
    wait_until(lambda: service.directory.remote.connected() == {"experts-0", "experts-1"}, WAIT_S)
    before = service.directory.stats()
    os.kill(service.actors()["experts-0"]["pid"], signal.SIGKILL)
    assert service.tokens("after a kill") == service.expected
    after = service.directory.stats()
    assert after.remote_rows > before.remote_rows
    assert after.local_rows == before.local_rows, "the router itself computes nothing"
    wait_settled(service.supervisor)
    assert service.tokens("replaced") == service.expected
