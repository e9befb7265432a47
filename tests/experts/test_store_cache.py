"""A node's cache: what is under a final name is right whatever happened, limits hold, and processes share it."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts import store_cache as cache_module
from experts.cache_eviction import CachedRecord, plan_cache
from experts.cached_store import CachedStore
from experts.errors import CacheDiskFull, CacheTooSmall, CacheUnusable
from experts.store import ExpertStore
from experts.store_cache import StoreCache, record_stem
from experts.weight_sources import FolderSource
from extraction.manifest import ExpertKey, group_of
from tests.experts import cache_kills as kills
from tests.experts.weight_peers import PATIENCE_S, assert_all_right, joining, record_files

KEY = ExpertKey("model", 2, 5)


@pytest.fixture(scope="module")
def whole(tiny_store: Path) -> ExpertStore:
    return ExpertStore.open(tiny_store)


def _group(store: ExpertStore, number: int, total: int) -> tuple[ExpertKey, ...]:
    return tuple(key for key in store.expert_keys() if group_of(key, total) == number)


def _fill(
    root: Path, whole: ExpertStore, keys: tuple[ExpertKey, ...], limit_bytes: int | None = None
) -> None:
    source = FolderSource(whole.root, whole.hash)
    with joining(root, whole.hash, source, keys=keys, limit_bytes=limit_bytes) as store:
        assert store.wait(PATIENCE_S)


# Limits


def test_group_above_the_limit_is_refused_with_both_numbers(tmp_path: Path, whole: ExpertStore) -> None:
    needed = sum(whole.record(key).nbytes for key in whole.expert_keys())
    with pytest.raises(CacheTooSmall, match=f"take {needed} bytes, above .* limit of {needed - 1} bytes"):
        _fill(tmp_path, whole, whole.expert_keys(), needed - 1)
    assert record_files(tmp_path) == []
    _fill(tmp_path, whole, whole.expert_keys(), needed)


def test_records_that_no_group_needs_leave_oldest_first(tmp_path: Path, whole: ExpertStore) -> None:
    size = whole.record(KEY).nbytes
    first, second, third = (_group(whole, number, 4) for number in range(3))
    limit = size * (len(first) + len(second))
    _fill(tmp_path, whole, first, limit)
    for path in record_files(tmp_path):
        os.utime(path, ns=(1, 1))
    _fill(tmp_path, whole, second, limit)
    _fill(tmp_path, whole, third[:1], limit)
    with joining(tmp_path, whole.hash, keys=()) as store:
        held = store.held_experts()
    assert held >= {*second, third[0]}
    assert len(held & set(first)) == len(first) - 1, "no more leave than have to"


def test_group_of_a_living_process_never_leaves(tmp_path: Path, whole: ExpertStore) -> None:
    size = whole.record(KEY).nbytes
    first, second = (_group(whole, number, 2) for number in range(2))
    source = FolderSource(whole.root, whole.hash)
    with joining(tmp_path, whole.hash, source, keys=first) as store:
        assert store.wait(PATIENCE_S)
        needed, limit = size * (len(first) + len(second)), size * len(first) + 1
        with pytest.raises(CacheTooSmall, match=f"take {needed} bytes, above .* limit of {limit} bytes"):
            _fill(tmp_path, whole, second, limit)
        assert store.held_experts() == frozenset(first)
    _fill(tmp_path, whole, second, limit)
    with joining(tmp_path, whole.hash, keys=()) as store:
        assert store.held_experts() == frozenset(second)


def test_what_a_refused_wish_asked_for_is_not_kept(tmp_path: Path, whole: ExpertStore) -> None:
    size = whole.record(KEY).nbytes
    first, second = (_group(whole, number, 2) for number in range(2))
    source = FolderSource(whole.root, whole.hash)
    with joining(tmp_path, whole.hash, source, keys=first, limit_bytes=size * len(first)) as store:
        with pytest.raises(CacheTooSmall):
            store.need(second)
        assert store.wait(PATIENCE_S)
        assert store.progress().records_total == len(first)
        other = StoreCache(tmp_path, size * len(first))
        other.need(whole.hash, {})
        other.close()


OWNERS = st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 5).map(str))


@given(
    st.dictionaries(OWNERS, st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=12),
    st.dictionaries(OWNERS, st.integers(1, 50), max_size=8),
    st.none() | st.integers(0, 300),
    st.none() | st.integers(0, 300),
)
def test_plan_keeps_the_limit_and_every_need(
    held: dict[tuple[str, str], tuple[int, int]],
    needed: dict[tuple[str, str], int],
    limit: int | None,
    free: int | None,
) -> None:
    needed = {owner: held[owner][0] if owner in held else nbytes for owner, nbytes in needed.items()}
    records = [CachedRecord(*owner, nbytes, age, "file") for owner, (nbytes, age) in held.items()]
    plan = plan_cache(records, needed, limit, free)
    assert plan.fits == (limit is None or sum(needed.values()) <= limit)
    assert not any(record.owner in needed for record in plan.evict)
    kept = [record for record in records if record not in plan.evict]
    if plan.fits and limit is not None:
        assert sum(record.nbytes for record in kept) + plan.missing_bytes <= limit
    left = [record.used_at_ns for record in kept if record.owner not in needed]
    assert all(record.used_at_ns <= min(left) for record in plan.evict if left)
    if plan.evict:
        last, surplus = plan.evict[-1], sum(record.nbytes for record in plan.evict)
        over = max(
            -1 if limit is None else sum(r.nbytes for r in records) + plan.missing_bytes - limit,
            -1 if free is None else plan.missing_bytes - free,
        )
        assert surplus - last.nbytes < over, "the last one had to leave"
    assert plan == plan_cache(list(reversed(records)), needed, limit, free)


# Disks


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_full_disk_says_so_and_leaves_nothing(tmp_path: Path, whole: ExpertStore, share: float) -> None:
    nbytes = whole.record(KEY).nbytes
    said = kills.run_beyond_a_limit(tmp_path, whole.root, KEY, int(share * nbytes))
    assert len(said) == 2, said
    assert f"the disk is full; {nbytes} bytes needed" in str(said[0])
    assert said[1] is True
    assert [path.name[:13] for path in record_files(tmp_path)] == ["0-00002-00005"]


def test_disk_too_small_for_a_group_is_refused_at_once(
    mount_disk: Callable[[str], Path], whole: ExpertStore
) -> None:
    disk = mount_disk("size=256k")
    source = FolderSource(whole.root, whole.hash)
    with (
        pytest.raises(CacheDiskFull, match=r"bytes needed, \d+ free"),
        joining(disk / "cache", whole.hash, source),
    ):
        pass
    assert record_files(disk / "cache") == []
    keys = whole.expert_keys()[:4]
    with joining(disk / "cache", whole.hash, FolderSource(whole.root, whole.hash), keys=keys) as store:
        assert store.wait(PATIENCE_S)


def test_disk_that_fills_up_meanwhile_pauses_and_goes_on(
    tmp_path: Path, whole: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, is_full, refused = os.write, threading.Event(), threading.Event()

    def full(descriptor: int, data: bytes) -> int:
        if is_full.is_set() and len(data) > 1000:
            refused.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(cache_module.os, "write", full)
    monkeypatch.setattr("experts.record_fetcher.RETRY_S", 0.05)
    is_full.set()
    with joining(tmp_path, whole.hash, FolderSource(whole.root, whole.hash)) as store:
        assert refused.wait(PATIENCE_S)
        assert not store.wait(0.1)
        assert "the disk is full" in store.progress().last_error
        is_full.clear()
        assert store.wait(PATIENCE_S)
    assert_all_right(tmp_path, whole)


def test_cache_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusable, match="file"):
        StoreCache(tmp_path / "file")
    with pytest.raises(CacheUnusable, match="Not a directory"):
        StoreCache(tmp_path / "file" / "cache")


# Kills


@pytest.mark.parametrize("seed", range(3))
def test_killed_fetchers_leave_only_right_records(tmp_path: Path, whole: ExpertStore, seed: int) -> None:
    rng, num_records = random.Random(seed), len(whole.expert_keys())
    for _ in range(6):
        kills.kill_at_random(tmp_path, whole.root, rng, num_records)
        assert_all_right(tmp_path, whole)
    _fill(tmp_path, whole, whole.expert_keys())
    assert assert_all_right(tmp_path, whole) == num_records
    assert not any(path.name.startswith(".") for path in record_files(tmp_path)), "the dead one's rests"
    assert list((tmp_path / "holders").iterdir()) == []


def test_record_cut_short_under_its_final_name_is_not_believed(tmp_path: Path, whole: ExpertStore) -> None:
    """No kill leaves one, but a failing disk may."""
    _fill(tmp_path, whole, whole.expert_keys())
    for path in record_files(tmp_path)[:5]:
        path.write_bytes(path.read_bytes()[:100])
    with joining(tmp_path, whole.hash, FolderSource(whole.root, whole.hash)) as store:
        assert store.wait(PATIENCE_S)
    assert assert_all_right(tmp_path, whole) == len(whole.expert_keys())


def test_names_that_are_none_are_left_alone(tmp_path: Path, whole: ExpertStore) -> None:
    records = tmp_path / "stores" / whole.hash / "records"
    records.mkdir(parents=True)
    sha256 = whole.record(KEY).sha256
    (records / "readme").write_text("mine")
    (records / f"0-00002-00005-{sha256}").symlink_to("/etc/passwd")
    with joining(tmp_path, whole.hash, FolderSource(whole.root, whole.hash)) as store:
        assert store.wait(PATIENCE_S)
        store.read_expert(KEY)
    assert (records / "readme").read_text() == "mine"
    assert Path("/etc/passwd").exists()


# Sharing


def test_two_processes_share_a_cache(tmp_path: Path, whole: ExpertStore) -> None:
    with kills.victim(tmp_path, whole.root) as (_, link):
        _fill(tmp_path, whole, whole.expert_keys())
        for _ in whole.expert_keys():
            assert link.poll(kills.DEADLINE_S)
            link.recv()
        with pytest.raises(CacheTooSmall):
            _fill(tmp_path, whole, (), limit_bytes=1)
    _fill(tmp_path, whole, (), limit_bytes=1)
    assert record_files(tmp_path) == []


def test_stuck_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StoreCache(tmp_path).close()
    monkeypatch.setattr(cache_module, "LOCK_TIMEOUT_S", 0.05)
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CacheUnusable, match="another process has held its lock"):
            StoreCache(tmp_path)


def test_many_stores_open_in_one_process(tmp_path: Path, whole: ExpertStore) -> None:
    """As several actors of a node would, each with a group of its own."""
    stores: list[CachedStore] = []
    try:
        for number in range(4):
            source = FolderSource(whole.root, whole.hash)
            stores.append(
                CachedStore.join(StoreCache(tmp_path), whole.hash, [source], _group(whole, number, 4))
            )
        assert all(store.wait(PATIENCE_S) for store in stores)
    finally:
        for store in stores:
            store.close()
    assert assert_all_right(tmp_path, whole) == len(whole.expert_keys())


def test_stems_are_unique_and_sort_as_keys_do() -> None:
    stems = [record_stem(c, layer, e) for c in range(2) for layer in (0, 9, 10) for e in (0, 9, 10, 100)]
    assert stems == sorted(set(stems))
