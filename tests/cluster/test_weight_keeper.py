"""The head's weight server under Ray: it comes back at its address, and an actor on a bare machine lives by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.errors import KeeperNotStarted
from cluster.resources import NAMESPACE, WEIGHT_KEEPER_NAME, expert_actor_options, start_ray
from cluster.weight_keeper import start_keeper, stop_keeper
from experts.actor import ActorSpec, ExpertActor
from experts.errors import SourceFailed
from experts.eviction import DEFAULT_EVICTION
from experts.store import ExpertStore
from experts.store_source import CacheSpec, StoreSource
from experts.weight_client import WeightLink
from tests.deadlines import wait_until
from tests.experts.weight_peers import SECRET

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def running_ray() -> Iterator[None]:
    start_ray(num_cpus=2)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def head(tiny_store: Path) -> Iterator[tuple[str, int]]:
    address = start_keeper(str(tiny_store), SECRET, "127.0.0.1")
    try:
        yield address
    finally:
        stop_keeper()


def _manifest(head: tuple[str, int]) -> bytes | None:
    try:
        link = WeightLink(*head, secret=SECRET)
        try:
            return link.manifest()
        finally:
            link.close()
    except SourceFailed:
        return None


def test_keeper_that_was_killed_comes_back_at_its_address(tiny_store: Path, head: tuple[str, int]) -> None:
    expected = (tiny_store / "manifest.json").read_bytes()
    assert _manifest(head) == expected
    ray.kill(ray.get_actor(WEIGHT_KEEPER_NAME, namespace=NAMESPACE), no_restart=False)
    wait_until(lambda: _manifest(head) == expected)


def test_actor_on_a_machine_without_the_store_fetches_its_group(
    tmp_path: Path, tiny_store: Path, head: tuple[str, int]
) -> None:
    whole = ExpertStore.open(tiny_store)
    group = whole.expert_keys()
    spec = ActorSpec(
        "experts-bare",
        1,
        "/absent",
        "float32",
        group,
        64,
        24,
        None,
        DEFAULT_EVICTION,
        1,
        "127.0.0.1",
        0.0,
        SECRET,
    )
    source = StoreSource(whole.hash, ("/absent",), head=head)
    arguments = {**vars(spec), "store_source": source, "cache": CacheSpec(str(tmp_path))}
    actor: Any = (
        ray.remote(ExpertActor).options(**expert_actor_options(spec.name)).remote(ActorSpec(**arguments))
    )
    try:
        wait_until(lambda: ray.get(actor.held.remote(), timeout=60.0) == frozenset(group))
        status = ray.get(actor.status.remote(), timeout=60.0)["store"]
        assert status["fetched_bytes"] == {f"127.0.0.1:{head[1]}": status["bytes_total"]}
    finally:
        ray.kill(actor)
    name = next(tmp_path.glob("stores/*/records/0-00002-00005-*"))
    raw = whole.read_expert(group[-3])
    assert torch.equal(torch.frombuffer(bytearray(name.read_bytes()), dtype=torch.uint8), raw)


def test_keeper_that_cannot_open_its_store_says_why(tmp_path: Path) -> None:
    with pytest.raises(KeeperNotStarted, match=r"manifest\.json"):
        start_keeper(str(tmp_path), SECRET, "127.0.0.1")
