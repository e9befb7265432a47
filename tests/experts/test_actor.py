"""An expert actor without Ray, on a machine without a store: it fetches its group, computes, and serves its records."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from experts.actor import ActorSpec, ExpertActor
from experts.call import ExpertCall
from experts.connection import ExpertConnection
from experts.errors import DeviceUnavailable, WeightsUnavailable
from experts.eviction import DEFAULT_EVICTION
from experts.store import ExpertStore
from experts.store_source import CacheSpec, StoreSource
from experts.worker import ExpertWorker
from extraction.manifest import group_of
from tests.experts.weight_peers import PATIENCE_S, SECRET, sharing
from tests.simulated_actors import SimulatedActor
from tests.simulated_device import DEVICE

WIDTH, EXPERT_WIDTH = 64, 24


@pytest.fixture(scope="module")
def whole(tiny_store: Path) -> ExpertStore:
    return ExpertStore.open(tiny_store)


def _spec(whole: ExpertStore, root: str, **changed: object) -> ActorSpec:
    group = tuple(key for key in whole.expert_keys() if group_of(key, 2) == 1)
    plain = ActorSpec(
        "experts-1",
        7,
        root,
        "float32",
        group,
        WIDTH,
        EXPERT_WIDTH,
        None,
        DEFAULT_EVICTION,
        1,
        "127.0.0.1",
        0.0,
        SECRET,
    )
    return replace(plain, **changed)  # type: ignore[arg-type]


@contextmanager
def _acting(spec: ActorSpec) -> Iterator[ExpertActor]:
    actor = ExpertActor(spec)
    try:
        yield actor
    finally:
        actor.stop()


def _rows(actor: ExpertActor) -> torch.Tensor:
    call = ExpertCall("model", 2, (1, 3, 5), (1, 1, 1), (0, 0, 0), torch.ones(1, WIDTH))
    link = ExpertConnection(actor.endpoint(), secret=SECRET)
    try:
        link.start(call, timeout_s=PATIENCE_S)
        return link.finish()
    finally:
        link.close()


def test_actor_without_the_store_computes_the_same_bits(tmp_path: Path, whole: ExpertStore) -> None:
    with _acting(_spec(whole, str(whole.root))) as actor:
        expected = _rows(actor)
        assert actor.weights_address() is None
        assert actor.status()["store"] == {"folder": str(whole.root), "is_cache": False}
    with sharing(whole.root) as head:
        source = StoreSource(whole.hash, (str(tmp_path / "absent"),), head=("127.0.0.1", head.port))
        spec = _spec(whole, "/absent", store_source=source, cache=CacheSpec(str(tmp_path / "cache")))
        with _acting(spec) as actor:
            assert torch.equal(_rows(actor), expected), "before anything was read ahead"
            assert actor._near.wait(PATIENCE_S)
            assert actor.held() == frozenset(spec.group)
            status = actor.status()["store"]
            assert (status["is_cache"], status["records_done"], status["records_total"]) == (True, 8, 8)
            assert torch.equal(_rows(actor), expected)


def test_actor_answers_while_its_group_is_still_to_be_read(
    whole: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: a service is ready before."""
    may_read = threading.Event()
    monkeypatch.setattr(ExpertWorker, "load_all", lambda worker: may_read.wait(PATIENCE_S))
    with _acting(_spec(whole, str(whole.root))) as actor:
        assert not any(actor.resident().values()), "it has said where it listens before anything was read"
        _rows(actor)
        assert actor.resident()["model", 2] == {1, 3, 5}
        may_read.set()


def test_actor_keeps_further_records_and_gives_them_to_its_peers(tmp_path: Path, whole: ExpertStore) -> None:
    other = tuple(key for key in whole.expert_keys() if group_of(key, 2) == 0)
    with sharing(whole.root) as head:
        source = StoreSource(whole.hash, (), head=("127.0.0.1", head.port))
        spec = _spec(whole, "/absent", store_source=source, cache=CacheSpec(str(tmp_path / "a")))
        with _acting(spec) as first:
            first.hold(other[:3])
            assert first._near.wait(PATIENCE_S)
            assert first.held() == {*spec.group, *other[:3]}
            peer = first.weights_address()
            assert peer is not None
            among_peers = replace(
                spec, store_source=StoreSource(whole.hash, (), (peer,)), cache=CacheSpec(str(tmp_path / "b"))
            )
            with _acting(among_peers) as second:
                assert second._near.wait(PATIENCE_S)
                assert list(second.status()["store"]["fetched_bytes"]) == [f"{peer[0]}:{peer[1]}"]


def test_actor_told_of_another_head_goes_on_there(tmp_path: Path, whole: ExpertStore) -> None:
    with sharing(whole.root) as head:
        source = StoreSource(whole.hash, (), head=("127.0.0.1", head.port))
        spec = _spec(whole, "/absent", store_source=source, cache=CacheSpec(str(tmp_path)))
        with _acting(replace(spec, group=spec.group[:1])) as actor:
            assert actor._near.wait(PATIENCE_S)
            head.stop()
            with sharing(whole.root) as another:
                actor.set_source(StoreSource(whole.hash, (), head=("127.0.0.1", another.port)))
                actor.hold(spec.group)
                assert actor._near.wait(PATIENCE_S)
            assert actor.held() == frozenset(spec.group)


def test_actor_that_finds_no_store_says_where_it_looked(tmp_path: Path, whole: ExpertStore) -> None:
    source = StoreSource(whole.hash, (str(tmp_path / "absent"),))
    with pytest.raises(WeightsUnavailable, match=r"absent.*give every machine the store, or a --store-cache"):
        ExpertActor(_spec(whole, "/absent", store_source=source))


def test_fingerprint_does_not_depend_on_where_records_come_from(whole: ExpertStore) -> None:
    """An actor that fetched its group is the same after its supervisor's restart, when others serve the weights."""
    spec = _spec(whole, "/s", store_source=StoreSource(whole.hash, (), (("127.0.0.1", 1),)))
    moved = replace(spec, store_source=StoreSource(whole.hash, (), (("127.0.0.1", 2),)))
    assert spec.fingerprint() == moved.fingerprint()
    assert spec.fingerprint() != replace(spec, store_root="/t").fingerprint()


@contextmanager
def _simulating(spec: ActorSpec) -> Iterator[ExpertActor]:
    actor = SimulatedActor(replace(spec, device="cuda"))
    try:
        yield actor
    finally:
        actor.stop()


def test_actor_on_a_device_computes_within_both_budgets_and_announces_its_class(whole: ExpertStore) -> None:
    spec = _spec(whole, str(whole.root))
    with _acting(spec) as plain:
        expected = _rows(plain)
    expert_bytes = whole.record(spec.group[0]).nbytes
    found = []
    for device_experts, host_experts in ((8, 8), (2, 1), (1, 1)):
        budgets = {
            "budget_bytes": device_experts * expert_bytes,
            "host_budget_bytes": host_experts * expert_bytes,
        }
        with _simulating(replace(spec, **budgets)) as actor:
            found.append(_rows(actor))
            status = actor.status()
            assert status["numerics_class"].startswith(f"{DEVICE.type}/")
            assert 0 < status["resident_bytes"] <= budgets["budget_bytes"] == status["budget_bytes"]
            behind = status["behind"]
            assert 0 < behind["resident_bytes"] <= budgets["host_budget_bytes"] == behind["budget_bytes"]
            actor.set_limits(expert_bytes, Fraction(1))
            assert actor.status()["resident_bytes"] <= expert_bytes
            assert torch.equal(_rows(actor), found[-1])
    assert torch.allclose(found[0], expected, atol=1e-5)
    assert all(torch.equal(rows, found[0]) for rows in found)


def test_actor_on_a_device_computes_for_others_who_lost_one(whole: ExpertStore) -> None:
    """Experts of no group of its own, beside one that fills its budget and one without."""
    spec = _spec(whole, str(whole.root))
    expert_bytes = whole.record(spec.group[0]).nbytes
    call = ExpertCall("model", 2, (0, 1, 2), (1, 1, 1), (0, 0, 0), torch.ones(1, WIDTH))
    found = []
    for group, budget in ((whole.expert_keys(), None), (spec.group, 8 * expert_bytes), (spec.group, None)):
        with _simulating(replace(spec, group=tuple(group), budget_bytes=budget)) as actor:
            found += [actor._compute(call), actor._compute(call)]
            held = actor.status()["resident_bytes"]
            assert held <= 8 * expert_bytes if group is spec.group else held
    assert all(torch.equal(rows, found[0]) for rows in found)


def test_actor_without_the_device_that_it_is_told_says_why(whole: ExpertStore) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceUnavailable, match="cuda"):
        ExpertActor(_spec(whole, str(whole.root), device="cuda"))
