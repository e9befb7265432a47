"""Where a machine finds its store: in place, copied from a shared folder, from peers, or from the head."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.cached_store import CachedStore
from experts.errors import WeightsUnavailable
from experts.fetch_queue import FetchQueue
from experts.mounts import is_on_network, network_kind
from experts.near_store import open_near
from experts.store import ExpertStore
from experts.store_source import CacheSpec, StoreSource
from extraction.manifest import ExpertKey
from tests.experts.weight_peers import PATIENCE_S, SECRET, sharing

KEY = ExpertKey("model", 2, 5)
MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export /mnt/shared nfs4 rw 0 0
tmpfs /mnt/shared/fast tmpfs rw 0 0
server:/two /mnt/with\\040space nfs rw 0 0
nonsense
"""


@pytest.fixture(scope="module")
def whole(tiny_store: Path) -> ExpertStore:
    return ExpertStore.open(tiny_store)


def test_store_on_this_disk_is_used_in_place(tmp_path: Path, whole: ExpertStore) -> None:
    source = StoreSource(whole.hash, (str(tmp_path / "absent"), str(whole.root)))
    for cache in (None, CacheSpec(str(tmp_path / "cache"))):
        near = open_near(source, whole.expert_keys(), cache, SECRET)
        assert type(near.store) is ExpertStore and near.store.root == whole.root
        assert near.status() == {"folder": str(whole.root), "is_cache": False}
        near.hold(whole.expert_keys())
        assert near.wait(0.0)
        near.close()
    assert not (tmp_path / "cache").exists()


def test_store_on_a_shared_disk_is_copied_where_there_is_a_cache(tmp_path: Path, whole: ExpertStore) -> None:
    source = StoreSource(whole.hash, (str(whole.root),))
    near = open_near(source, (KEY,), CacheSpec(str(tmp_path)), SECRET, is_remote=lambda path: True)
    assert near.wait(PATIENCE_S)
    status = near.status()
    assert (status["is_cache"], status["records_done"], list(status["fetched_bytes"])) == (
        True,
        1,
        [str(whole.root)],
    )
    near.close()
    in_place = open_near(source, (KEY,), None, SECRET, is_remote=lambda path: True)
    assert type(in_place.store) is ExpertStore
    in_place.close()


def test_peers_go_before_the_head_and_the_head_has_the_rest(
    tmp_path: Path, whole: ExpertStore, free_port: int
) -> None:
    keys = whole.expert_keys()
    part = Path(shutil.copytree(whole.root, tmp_path / "part"))
    (part / "experts/model-layer-0002.safetensors").unlink()
    with sharing(part) as peer, sharing(whole.root) as head:
        near, far = ("127.0.0.1", peer.port), ("127.0.0.1", head.port)
        source = StoreSource(whole.hash, (), (("127.0.0.1", free_port), near), far)
        near_store = open_near(source, keys, CacheSpec(str(tmp_path / "cache")), SECRET)
        store = near_store.store
        assert isinstance(store, CachedStore) and near_store.wait(PATIENCE_S)
        assert set(store.progress().fetched_bytes) == {f"127.0.0.1:{peer.port}", f"127.0.0.1:{head.port}"}
        assert all(torch.equal(store.read_expert(key), whole.read_expert(key)) for key in keys)
        store.close()


def test_store_that_lacks_this_group_s_files_is_completed(tmp_path: Path, whole: ExpertStore) -> None:
    part = Path(shutil.copytree(whole.root, tmp_path / "part"))
    (part / "experts/model-layer-0002.safetensors").unlink()
    source = StoreSource(whole.hash, (str(part),))
    there = tuple(key for key in whole.expert_keys() if key.layer == 0)
    open_near(source, there, None, SECRET).close()
    with pytest.raises(WeightsUnavailable, match=r"layer-0002.* or a --store-cache"):
        open_near(source, (KEY,), None, SECRET)
    with sharing(whole.root) as head:
        source = StoreSource(whole.hash, (str(part),), head=("127.0.0.1", head.port))
        near = open_near(source, whole.expert_keys(), CacheSpec(str(tmp_path / "cache")), SECRET)
        assert isinstance(near.store, CachedStore) and near.wait(PATIENCE_S)
        near.close()


def test_copies_that_this_machine_has_are_used_and_others_are_not_missed(
    tmp_path: Path, whole: ExpertStore
) -> None:
    copy = Path(shutil.copytree(whole.root, tmp_path / "copy"))
    source = StoreSource(whole.hash, (str(whole.root), str(tmp_path / "absent"), str(copy)))
    near = open_near(source, whole.expert_keys(), None, SECRET)
    assert near.copies == (copy,)
    near.close()


def test_another_store_under_the_same_path_is_not_taken(tmp_path: Path, whole: ExpertStore) -> None:
    source = StoreSource("0" * 64, (str(whole.root),))
    with pytest.raises(WeightsUnavailable, match="holds another store; give every machine"):
        open_near(source, (), None, SECRET)


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me", None),
        ("/mnt/shared", "nfs4"),
        ("/mnt/shared/stores/a", "nfs4"),
        ("/mnt/shared/fast/a", None),
        ("/mnt/sharedness", None),
        ("/mnt/with space/a", "nfs"),
    ],
)
def test_longest_mount_says_whether_a_folder_is_elsewhere(folder: str, kind: str | None) -> None:
    assert network_kind(folder, MOUNTS) == kind


def test_machine_without_a_list_of_mounts_counts_as_local(tmp_path: Path) -> None:
    assert not is_on_network(tmp_path, tmp_path / "absent")


# The queue

KEYS = tuple(ExpertKey("model", 0, expert) for expert in range(6))


def test_urgent_goes_first_and_the_rest_in_order() -> None:
    queue = FetchQueue()
    queue.want(KEYS)
    assert queue.take(0.0) == KEYS[0]
    queue.urge(KEYS[4])
    queue.urge(KEYS[0])  # is under way already
    assert [queue.take(0.0) for _ in range(5)] == [KEYS[4], KEYS[1], KEYS[2], KEYS[3], KEYS[5]]
    assert queue.take(0.0) is None and queue.wait_s(0.0) is None


def test_pause_holds_the_rest_back_but_nothing_urgent() -> None:
    queue = FetchQueue()
    queue.want(KEYS)
    queue.pause(5.0)
    assert queue.take(4.0) is None and queue.wait_s(4.0) == 1.0
    queue.urge(KEYS[3])
    assert queue.take(4.0) == KEYS[3]
    assert queue.take(5.0) == KEYS[0]


@given(
    st.lists(st.tuples(st.sampled_from(["want", "urge", "take", "done", "failed"]), st.sampled_from(KEYS)))
)
def test_no_key_is_twice_under_way_and_none_is_forgotten(events: list[tuple[str, ExpertKey]]) -> None:
    queue, under_way, open_keys = FetchQueue(), set(), set()
    for now_s, (event, key) in enumerate(events):
        if event == "want":
            queue.want([key])
            open_keys.add(key)
        elif event == "urge":
            queue.urge(key)
            open_keys.add(key)
        elif event == "take":
            taken = queue.take(now_s)
            assert taken not in under_way
            under_way |= {taken} - {None}
        elif key in under_way:
            under_way.discard(key)
            if event == "done":
                queue.done(key)
                open_keys.discard(key)
            else:
                queue.failed(key, now_s)
                open_keys -= {key} - queue._wanted.keys()
    while (taken := queue.take(1e9)) is not None:
        assert taken not in under_way
        under_way.add(taken)
    assert under_way == open_keys
