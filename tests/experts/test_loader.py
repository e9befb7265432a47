"""Loading: aligned windows past the page cache, retries and copies, and what a failed load leaves behind."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experts import cache as cache_module
from experts.buffers import BufferPool
from experts.call import ExpertCall
from experts.errors import ExpertCorrupt, StoreDamaged
from experts.loader import ExpertLoader
from experts.numerics import RowKernel, calibrate
from experts.store import BLOCK_BYTES, VECTOR_BYTES, ExpertStore
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey

WIDTH, EXPERT_WIDTH, NUM_EXPERTS = 64, 24, 8
EXPERT_BYTES = 3 * WIDTH * EXPERT_WIDTH * 4
WINDOW_BYTES = -(-EXPERT_BYTES // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
KERNEL: RowKernel = calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], torch.float32)


@pytest.fixture
def root(tiny_store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_store, tmp_path / "store")


@pytest.fixture
def store(root: Path) -> Iterator[ExpertStore]:
    opened = ExpertStore.open(root)
    yield opened
    opened.close()


def _window() -> torch.Tensor:
    return BufferPool(None, is_aligned=True).take(WINDOW_BYTES)


def _worker(store: ExpertStore, **options: Any) -> ExpertWorker:
    return ExpertWorker(store, KERNEL, torch.float32, widths={"model": WIDTH}, **options)


def _call(seed: int) -> ExpertCall:
    chance = random.Random(seed)
    experts = tuple(sorted(chance.sample(range(NUM_EXPERTS), chance.randint(1, NUM_EXPERTS))))
    counts = tuple(chance.randint(1, 9) for _ in experts)
    rows = tuple(chance.randrange(6) for _ in range(sum(counts)))
    tokens_TD = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
    return ExpertCall("model", chance.choice((0, 2)), experts, counts, rows, tokens_TD)


def _damage(root: Path, store: ExpertStore, key: ExpertKey) -> None:
    part = store.record(key).parts[1]
    with (root / part.file).open("r+b") as file:
        file.seek(part.offset)
        byte = file.read(1)
        file.seek(part.offset)
        file.write(bytes([byte[0] ^ 1]))


def test_direct_reads_give_the_same_aligned_bytes(store: ExpertStore) -> None:
    for key in store.expert_keys():
        window = _window()
        raw = store.read_into(key, window, direct=True)
        assert torch.equal(raw, store.read_expert(key))
        assert raw.data_ptr() % VECTOR_BYTES == 0
        assert window.data_ptr() <= raw.data_ptr() < window.data_ptr() + BLOCK_BYTES, "no second copy"


@pytest.mark.parametrize("refused", ["open", "read"])
def test_a_file_system_that_refuses_direct_reads_is_read_through_the_page_cache(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    opened, read = os.open, os.preadv
    direct: set[int] = set()

    def refuse_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "refused")
        descriptor = opened(path, flags, *rest, **named)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def refuse_read(descriptor: int, buffers: Any, offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "refused")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "preadv", refuse_read)
    for key in store.expert_keys()[:3]:
        assert torch.equal(store.read_into(key, _window(), direct=True), store.read_expert(key))


def test_a_short_direct_read_is_completed(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:1000]], offset))
    key = store.expert_keys()[3]
    raw = store.read_into(key, _window(), direct=True)
    monkeypatch.undo()
    assert torch.equal(raw, store.read_expert(key))


def test_a_failed_hash_is_retried_from_the_store_and_then_from_a_copy(
    root: Path, store: ExpertStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    key = store.expert_keys()[2]
    expected = ExpertStore.open(copy).read_expert(key)
    _damage(root, store, key)
    loader = ExpertLoader(store, copies=[copy])
    raw = loader.load(key, torch.empty(EXPERT_BYTES, dtype=torch.uint8))
    loader.close()
    assert torch.equal(raw, expected)
    assert sum("the bytes were altered" in record.getMessage() for record in caplog.records) == 2


def test_an_expert_that_no_copy_has_is_named(root: Path, store: ExpertStore, tmp_path: Path) -> None:
    key = store.expert_keys()[2]
    copy = shutil.copytree(root, tmp_path / "copy")
    for folder in (root, copy):
        _damage(folder, store, key)
    loader = ExpertLoader(store, copies=[copy])
    with pytest.raises(ExpertCorrupt, match=r"expert \('model', 0, 2\) in .* the bytes were altered"):
        loader.load(key, torch.empty(EXPERT_BYTES, dtype=torch.uint8))
    loader.close()


def test_a_copy_of_another_store_is_refused(store: ExpertStore, stories_store: Path) -> None:
    with pytest.raises(StoreDamaged, match="holds another store"):
        _worker(store, copies=[stories_store])


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even small experts are loaded by other threads."""
    monkeypatch.setattr(cache_module, "MIN_PARALLEL_BYTES", 1)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("num_budget", [1, 3, 8, None])
@pytest.mark.parametrize("direct", [False, True])
def test_computing_while_loading_gives_the_same_bits_within_the_budget(
    store: ExpertStore, num_budget: int | None, direct: bool
) -> None:
    expert_bytes = WINDOW_BYTES if direct else EXPERT_BYTES
    budget = None if num_budget is None else num_budget * expert_bytes + expert_bytes // 2
    worker, plain = _worker(store, budget_bytes=budget, direct=direct), _worker(store)
    plain.load_all()
    for seed in range(30):
        call = _call(seed)
        with torch.inference_mode(seed % 2 == 0):
            assert torch.equal(worker.compute(call), plain.compute(call))
        assert worker.resident_bytes == worker.num_resident * expert_bytes
        assert worker.resident_bytes <= worker.cache.allocated_bytes <= (budget or 1 << 30)
    worker.close()


@pytest.mark.usefixtures("beside")
def test_a_load_that_fails_beside_others_keeps_what_came(root: Path, store: ExpertStore) -> None:
    worker = _worker(store, budget_bytes=5 * EXPERT_BYTES, direct=False)
    _damage(root, store, ExpertKey("model", 0, 4))
    tokens_TD = torch.ones(1, WIDTH)
    with pytest.raises(ExpertCorrupt, match=r"\('model', 0, 4\)"):
        worker.compute(ExpertCall("model", 0, (1, 4, 6), (1, 1, 1), (0, 0, 0), tokens_TD))
    assert worker.resident("model", 0) == {1, 6}
    assert worker.resident_bytes == 2 * EXPERT_BYTES
    call = ExpertCall("model", 0, (0, 1, 2, 3, 6), (1,) * 5, (0,) * 5, tokens_TD)
    assert torch.equal(worker.compute(call), _worker(store).compute(call))
    assert worker.cache.allocated_bytes <= 5 * EXPERT_BYTES
    worker.close()


def test_large_experts_pass_the_page_cache_by_where_they_exceed_the_budget(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _worker(store, budget_bytes=3 * EXPERT_BYTES).cache._loader.direct, "small ones do not"
    monkeypatch.setattr(cache_module, "MIN_PARALLEL_BYTES", EXPERT_BYTES)
    assert _worker(store, budget_bytes=3 * WINDOW_BYTES).cache._loader.direct
    assert not _worker(store, budget_bytes=1 << 30).cache._loader.direct
    assert not _worker(store).cache._loader.direct


def test_buffers_are_used_again_and_never_exceed_the_limit() -> None:
    pool = BufferPool(10_000)
    first, second = pool.take(4000), pool.take(4000)
    place = first.data_ptr()
    pool.give(first)
    assert pool.take(4000).data_ptr() == place
    pool.give(second)
    pool.take(6000)
    assert pool.allocated_bytes == 10_000, "a free buffer of another size has gone"
