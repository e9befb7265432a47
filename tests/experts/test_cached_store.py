"""A machine without a store: its group's records come, are checked, stay, and are computed with."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from experts.errors import ExpertCorrupt, StoreDamaged, UnknownExpert, WeightsUnavailable
from experts.store import ExpertStore
from experts.weight_sources import FolderSource
from extraction.extract import extract
from extraction.manifest import ExpertKey, group_of
from tests.experts.weight_peers import (
    PATIENCE_S,
    FakeWeightServer,
    assert_all_right,
    joining,
    record_files,
    sharing,
    source_of,
    speak,
)

KEY = ExpertKey("model", 2, 5)


@pytest.fixture(scope="module")
def whole(tiny_store: Path) -> ExpertStore:
    return ExpertStore.open(tiny_store)


def test_group_comes_from_a_server_and_nothing_else_does(tmp_path: Path, whole: ExpertStore) -> None:
    group = tuple(key for key in whole.expert_keys() if group_of(key, 2) == 1)
    with (
        sharing(whole.root) as server,
        joining(tmp_path, whole.hash, source_of(server.port, whole.hash), keys=group) as store,
    ):
        assert store.wait(PATIENCE_S)
        assert store.held_experts() == frozenset(group)
        progress = store.progress()
        assert (progress.records_done, progress.records_total) == (len(group), len(group))
        assert progress.bytes_done == progress.bytes_total == sum(whole.record(k).nbytes for k in group)
        assert progress.fetched_bytes == {f"127.0.0.1:{server.port}": progress.bytes_total}
        for key in group:
            assert torch.equal(store.read_expert(key), whole.read_expert(key))
    assert assert_all_right(tmp_path, whole) == len(group)


def test_record_that_nobody_fetched_ahead_comes_when_it_is_read(tmp_path: Path, whole: ExpertStore) -> None:
    with (
        sharing(whole.root) as server,
        joining(tmp_path, whole.hash, source_of(server.port, whole.hash), keys=()) as store,
    ):
        assert not store.holds(KEY)
        assert torch.equal(store.read_expert(KEY), whole.read_expert(KEY))
        assert store.held_experts() == {KEY}


def test_what_somebody_waits_for_goes_before_the_rest(tmp_path: Path, whole: ExpertStore) -> None:
    """The server gives one record for each token that the test drops in."""
    tokens, asked = threading.Semaphore(0), threading.Semaphore(0)

    def answer(connected: object, sequence: int, record: bytes) -> None:
        asked.release()
        assert tokens.acquire(timeout=PATIENCE_S)
        connected.sendall(speak(record, sequence))  # type: ignore[attr-defined]

    keys = whole.expert_keys()
    with (
        FakeWeightServer(whole.root, answer) as server,
        joining(tmp_path, whole.hash, source_of(server.port, whole.hash)) as store,
    ):
        for _ in range(2):  # both threads are under way with the first two
            assert asked.acquire(timeout=PATIENCE_S)
        got: list[torch.Tensor] = []
        reader = threading.Thread(target=lambda: got.append(store.read_expert(keys[-1])))
        reader.start()
        while not store._fetcher._waited:
            threading.Event().wait(0.001)
        tokens.release(4)  # the first two, the one that is waited for, and one of the next two
        reader.join(PATIENCE_S)
        assert torch.equal(got[0], whole.read_expert(keys[-1]))
        assert len(store.held_experts()) <= 4
        tokens.release(len(keys))
        assert store.wait(PATIENCE_S)


def test_second_start_fetches_nothing(tmp_path: Path, whole: ExpertStore) -> None:
    with (
        sharing(whole.root) as server,
        joining(tmp_path, whole.hash, source_of(server.port, whole.hash)) as store,
    ):
        assert store.wait(PATIENCE_S)
    with joining(tmp_path, whole.hash) as store:
        assert store.wait(0.0)
        assert torch.equal(store.read_expert(KEY), whole.read_expert(KEY))


def test_record_damaged_on_the_disk_is_fetched_again(tmp_path: Path, whole: ExpertStore) -> None:
    with (
        sharing(whole.root) as server,
        joining(tmp_path, whole.hash, source_of(server.port, whole.hash)) as store,
    ):
        assert store.wait(PATIENCE_S)
        path = store._fetcher.path_of(KEY)
        assert path is not None
        path.chmod(0o600)
        for damage in (b"", path.read_bytes()[:-1], b"\0" * path.stat().st_size):
            path.write_bytes(damage)
            store._verified.discard(KEY)
            assert torch.equal(store.read_expert(KEY), whole.read_expert(KEY))
    assert assert_all_right(tmp_path, whole) == len(whole.expert_keys())


def test_record_damaged_on_the_disk_without_a_source_is_refused(tmp_path: Path, whole: ExpertStore) -> None:
    with joining(tmp_path, whole.hash, FolderSource(whole.root, whole.hash)) as store:
        assert store.wait(PATIENCE_S)
    (path,) = (path for path in record_files(tmp_path) if path.name.startswith("0-00002-00005-"))
    path.write_bytes(b"\1" * path.stat().st_size)
    with (
        joining(tmp_path, whole.hash, keys=()) as store,
        pytest.raises(WeightsUnavailable, match=r"expert \('model', 2, 5\)"),
    ):
        store.read_expert(KEY)


def test_damaged_description_is_replaced(tmp_path: Path, whole: ExpertStore) -> None:
    with joining(tmp_path, whole.hash, FolderSource(whole.root, whole.hash)) as store:
        assert store.wait(PATIENCE_S)
    for name in ("manifest.json", "experts.parquet", "tokenizer.json"):
        path = tmp_path / "stores" / whole.hash / name
        path.write_bytes(path.read_bytes()[:-3])
        with (
            pytest.raises(WeightsUnavailable, match="the description of store"),
            joining(tmp_path, whole.hash),
        ):
            pass
        with joining(tmp_path, whole.hash, FolderSource(whole.root, whole.hash)) as store:
            assert store.wait(0.0)


def test_direct_reads_give_the_same_bytes(tmp_path: Path, whole: ExpertStore) -> None:
    from experts.buffers import BufferPool

    with joining(tmp_path, whole.hash, FolderSource(whole.root, whole.hash)) as store:
        window = BufferPool(None, is_aligned=True).take(store.window_bytes(KEY, direct=True))
        assert torch.equal(store.read_into(KEY, window, direct=True), whole.read_expert(KEY))


def test_cache_has_no_backbone_and_no_unknown_expert(tmp_path: Path, whole: ExpertStore) -> None:
    with joining(tmp_path, whole.hash, FolderSource(whole.root, whole.hash), keys=()) as store:
        with pytest.raises(StoreDamaged, match="holds experts only"):
            store.read_tensor("model", "norm.weight")
        with pytest.raises(UnknownExpert):
            store.read_expert(ExpertKey("model", 1, 0))
        with pytest.raises(UnknownExpert):
            store.need([ExpertKey("talker", 2, 0)])


def test_cache_serves_what_it_holds_and_says_what_it_does_not(tmp_path: Path, whole: ExpertStore) -> None:
    from experts.weight_server import WeightServer
    from tests.experts.weight_peers import SECRET

    keys = whole.expert_keys()
    with joining(tmp_path / "near", whole.hash, FolderSource(whole.root, whole.hash), keys=keys[:3]) as near:
        assert near.wait(PATIENCE_S)
        server = WeightServer(near, secret=SECRET)
        server.start()
        try:
            peer = source_of(server.port, whole.hash, is_origin=False)
            with joining(tmp_path / "far", whole.hash, peer, keys=keys[:3]) as far:
                assert far.wait(PATIENCE_S)
                assert torch.equal(far.read_expert(keys[1]), whole.read_expert(keys[1]))
                with pytest.raises(WeightsUnavailable, match="does not have expert"):
                    far.read_expert(keys[3])
        finally:
            server.stop()


def test_indexed_store_comes_with_hashes_of_the_origin_only(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Its index has none: a peer could give anything, so that only who reads the shards is believed."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    extract(checkpoint, tmp_path / "index", index_only=True)
    indexed = ExpertStore.open(tmp_path / "index")
    with sharing(tmp_path / "index") as server:
        peer = source_of(server.port, indexed.hash, is_origin=False)
        with (
            joining(tmp_path / "a", indexed.hash, peer, keys=()) as store,
            pytest.raises(WeightsUnavailable, match="with a hash to compare it with"),
        ):
            store.read_expert(KEY)
        with joining(tmp_path / "b", indexed.hash, source_of(server.port, indexed.hash)) as store:
            assert store.wait(PATIENCE_S)
            for key in indexed.expert_keys():
                assert torch.equal(store.read_expert(key), indexed.read_expert(key))
    with joining(tmp_path / "b", indexed.hash) as store:
        assert store.wait(0.0) and torch.equal(store.read_expert(KEY), indexed.read_expert(KEY))


def test_shard_that_changed_since_it_was_hashed_is_not_given(tmp_path: Path, tiny_checkpoint: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    extract(checkpoint, tmp_path / "index", index_only=True)
    indexed = ExpertStore.open(tmp_path / "index")
    indexed.read_expert(KEY)
    part = indexed.record(KEY).parts[1]
    with (checkpoint / part.file).open("r+b") as file:
        file.seek(part.offset)
        file.write(b"\xff\xff\xff\xff")
    with (
        sharing(tmp_path / "index") as server,
        joining(tmp_path / "cache", indexed.hash, source_of(server.port, indexed.hash), keys=()) as store,
        pytest.raises(WeightsUnavailable, match="the bytes were altered"),
    ):
        store.read_expert(KEY)
    with pytest.raises(ExpertCorrupt):
        ExpertStore.open(tmp_path / "index").read_expert(KEY)
