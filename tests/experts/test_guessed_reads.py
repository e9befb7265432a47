"""Experts read ahead of their use: the same bits within the same budget, whatever was guessed and whenever it comes.

Reads of the store are held by the tests, so that a guess is still queued, under way, there or failed when its experts
are asked for.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from experts import cache as cache_module
from experts.call import ExpertCall
from experts.errors import ExpertCorrupt, UnknownExpert
from experts.guessed_reads import MOST_READS
from experts.loader import LOAD_THREADS
from experts.numerics import RowKernel, calibrate
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey

WIDTH, EXPERT_WIDTH, NUM_EXPERTS = 64, 24, 8
EXPERT_BYTES = 3 * WIDTH * EXPERT_WIDTH * 4
KERNEL: RowKernel = calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], torch.float32)
PATIENCE_S = 30


class HeldStore:
    """A store whose reads of some experts wait to be released, and fail where they are told to."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        self.held: set[int] = set()
        self.failing: set[int] = set()
        self.log: list[tuple[str, int]] = []

    @property
    def begun(self) -> list[int]:
        return [expert for what, expert in self.log if what == "begun"]

    @property
    def ended(self) -> list[int]:
        return [expert for what, expert in self.log if what == "ended"]

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def read_into(self, key: ExpertKey, window: torch.Tensor, *, direct: bool = False) -> torch.Tensor:
        with self._changed:
            self.log.append(("begun", key.expert))
            self._changed.notify_all()
            self._changed.wait_for(lambda: key.expert not in self.held, PATIENCE_S)
        try:
            if key.expert in self.failing:
                raise ExpertCorrupt(str(tuple(key)), "experts.bin", 0, "the bytes were altered")
            return self._store.read_into(key, window, direct=direct)
        finally:
            with self._changed:
                self.log.append(("ended", key.expert))
                self._changed.notify_all()

    def release(self, *experts: int) -> None:
        with self._changed:
            self.held -= set(experts)
            self._changed.notify_all()

    def wait_until_begun(self, *experts: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(experts) <= set(self.begun), PATIENCE_S)


@pytest.fixture
def store(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldStore]:
    """Its small experts are taken for large ones, which are read by other threads."""
    monkeypatch.setattr(cache_module, "MIN_PARALLEL_BYTES", 1)
    opened = ExpertStore.open(tiny_store)
    held = HeldStore(opened)
    yield held
    held.release(*range(NUM_EXPERTS))
    opened.close()


@pytest.fixture
def workers() -> Iterator[list[ExpertWorker]]:
    made: list[ExpertWorker] = []
    yield made
    for worker in made:
        worker.close()


@pytest.fixture
def open_worker(store: HeldStore, workers: list[ExpertWorker]) -> Any:
    def make(num_experts: float | None = None, **options: Any) -> ExpertWorker:
        budget = None if num_experts is None else int(num_experts * EXPERT_BYTES)
        made = cast(ExpertStore, store)
        options = {"budget_bytes": budget, "direct": False, "eviction": "lru"} | options
        workers.append(ExpertWorker(made, KERNEL, torch.float32, widths={"model": WIDTH}, **options))
        return workers[-1]

    yield make
    store.release(*range(NUM_EXPERTS))  # closing a worker waits for its reads


def _call(*experts: int, layer: int = 0, seed: int = 0) -> ExpertCall:
    tokens_TD = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))
    return ExpertCall("model", layer, experts, (1,) * len(experts), (0,) * len(experts), tokens_TD)


def _reference(store: HeldStore, call: ExpertCall) -> torch.Tensor:
    worker = ExpertWorker(store._store, KERNEL, torch.float32, widths={"model": WIDTH})
    try:
        return worker.compute(call)
    finally:
        worker.close()


def _prefetch_and_wait(worker: ExpertWorker, experts: Sequence[int], layer: int = 0) -> None:
    """Until nothing is under way: only for a store that holds nothing."""
    worker.prefetch("model", layer, experts)
    for future in list(worker.cache._guesses._reading.values()):
        future.exception(PATIENCE_S)


def _wait_for_residents(worker: ExpertWorker, experts: set[int]) -> None:
    """Until another thread's call has made room for these and no others."""
    deadline = time.monotonic() + PATIENCE_S
    while worker.resident("model", 0) != experts:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_right_guess_is_there_when_it_is_needed_and_counts_as_a_miss(
    store: HeldStore, open_worker: Any
) -> None:
    worker = open_worker(4)
    _prefetch_and_wait(worker, (1, 5))
    assert sorted(store.ended) == [1, 5]
    assert torch.equal(worker.compute(_call(1, 5)), _reference(store, _call(1, 5)))
    stats = worker.stats
    assert (stats.prefetched, stats.prefetched_used, stats.hits, stats.misses) == (2, 2, 0, 2)
    worker.compute(_call(1, 5))
    stats = worker.stats
    assert (stats.prefetched_used, stats.hits, stats.misses) == (2, 2, 2), (
        "later uses are hits like any other"
    )
    assert stats.bytes_read == 2 * EXPERT_BYTES


def test_a_guess_under_way_is_waited_for_and_not_read_again(store: HeldStore, open_worker: Any) -> None:
    worker = open_worker(4)
    call = _call(1, 2, 5)
    store.held = {1, 5}
    worker.prefetch("model", 0, (1, 5))
    store.wait_until_begun(1, 5)
    rows: list[torch.Tensor] = []
    computing = threading.Thread(target=lambda: rows.append(worker.compute(call)))
    computing.start()
    store.wait_until_begun(2)  # the one that nobody guessed is read meanwhile
    assert not rows
    store.release(1, 5)
    computing.join(PATIENCE_S)
    assert torch.equal(rows[0], _reference(store, call))
    assert sorted(store.begun)[:3] == [1, 2, 5]
    assert worker.stats.bytes_read == 3 * EXPERT_BYTES


def test_a_wrong_guess_in_the_queue_makes_way_and_is_never_read(store: HeldStore, open_worker: Any) -> None:
    worker = open_worker(NUM_EXPERTS)
    reading, queued = set(range(LOAD_THREADS)), set(range(LOAD_THREADS, LOAD_THREADS + 2))
    store.held = set(reading)
    worker.prefetch("model", 0, (*reading, *queued))
    store.wait_until_begun(*reading)
    computing = threading.Thread(target=worker.compute, args=(_call(7),))
    computing.start()
    _wait_for_residents(worker, reading | {7})
    store.release(*reading)
    computing.join(PATIENCE_S)
    assert set(store.begun) == reading | {7}
    assert worker.stats.prefetched == LOAD_THREADS


def test_wrong_guesses_under_way_give_their_bytes_to_what_is_needed(
    store: HeldStore, open_worker: Any
) -> None:
    """The budget holds two experts, both are promised to guesses, and the call needs two others."""
    worker = open_worker(2)
    store.held = {0, 1}
    worker.prefetch("model", 0, (0, 1))
    store.wait_until_begun(0, 1)
    rows: list[torch.Tensor] = []
    computing = threading.Thread(target=lambda: rows.append(worker.compute(_call(3, 4))))
    computing.start()
    _wait_for_residents(worker, {3, 4})
    store.release(0, 1)
    computing.join(PATIENCE_S)
    assert torch.equal(rows[0], _reference(store, _call(3, 4)))
    assert set(store.log[2:4]) == {("ended", 0), ("ended", 1)}, "no buffer is written to by two reads"
    assert worker.resident("model", 0) == {3, 4}
    assert worker.cache.allocated_bytes == 2 * EXPERT_BYTES
    stats = worker.stats
    assert (stats.prefetched, stats.prefetched_used, stats.bytes_read) == (2, 0, 4 * EXPERT_BYTES)


def test_a_wrong_guess_goes_before_every_expert_that_was_used(store: HeldStore, open_worker: Any) -> None:
    worker = open_worker(3)
    worker.compute(_call(0, 1, 2))
    worker.compute(_call(1, 2))
    _prefetch_and_wait(worker, (5,))
    assert worker.resident("model", 0) == {1, 2, 5}, "it took the place of the one that would have gone first"
    worker.compute(_call(7))
    assert worker.resident("model", 0) == {1, 2, 7}


def test_guessed_experts_that_are_there_stay(store: HeldStore, open_worker: Any) -> None:
    worker = open_worker(3)
    for expert in (0, 1, 2):
        worker.compute(_call(expert))
    _prefetch_and_wait(worker, (5, 0))
    assert worker.resident("model", 0) == {0, 2, 5}


def test_only_as_many_are_begun_as_fit_and_as_a_guess_may_have(store: HeldStore, open_worker: Any) -> None:
    everything = range(NUM_EXPERTS)
    small = open_worker(2.5)
    _prefetch_and_wait(small, everything)
    assert small.resident("model", 0) == {0, 1}
    both = open_worker()
    _prefetch_and_wait(both, everything)
    _prefetch_and_wait(both, everything, layer=2)
    assert both.stats.prefetched == 2 * min(MOST_READS, NUM_EXPERTS)


def test_nothing_is_begun_while_an_earlier_guess_is_being_read(store: HeldStore, open_worker: Any) -> None:
    worker = open_worker(NUM_EXPERTS)
    store.held = {0}
    worker.prefetch("model", 0, (0,))
    store.wait_until_begun(0)
    worker.prefetch("model", 0, (3,))
    assert worker.resident("model", 0) == {0}
    store.release(0)
    worker.compute(_call(0))
    _prefetch_and_wait(worker, (3,))
    assert worker.resident("model", 0) == {0, 3}


def test_a_failed_guess_is_no_error_until_it_is_needed(store: HeldStore, open_worker: Any) -> None:
    worker = open_worker(2)
    store.failing = {4}
    _prefetch_and_wait(worker, (4, 6))
    assert torch.equal(worker.compute(_call(6)), _reference(store, _call(6)))
    assert worker.resident("model", 0) == {6}
    with pytest.raises(ExpertCorrupt, match=r"\('model', 0, 4\)"):
        worker.compute(_call(4))
    store.failing = set()
    assert torch.equal(worker.compute(_call(4)), _reference(store, _call(4)))
    assert worker.stats.bytes_read == 2 * EXPERT_BYTES


def test_a_guess_that_fails_under_way_fails_the_call_that_needs_it(
    store: HeldStore, open_worker: Any
) -> None:
    worker = open_worker(3)
    store.held, store.failing = {4}, {4}
    worker.prefetch("model", 0, (4,))
    store.wait_until_begun(4)
    store.release(4)
    with pytest.raises(ExpertCorrupt, match=r"\('model', 0, 4\)"):
        worker.compute(_call(2, 4))
    assert worker.resident("model", 0) <= {2}
    assert worker.resident_bytes == worker.num_resident * EXPERT_BYTES
    store.failing = set()
    assert torch.equal(worker.compute(_call(2, 4)), _reference(store, _call(2, 4)))


def test_small_and_converted_experts_are_not_read_ahead(
    store: HeldStore, open_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = ExpertWorker(cast(ExpertStore, store), KERNEL, torch.bfloat16, widths={"model": WIDTH})
    monkeypatch.setattr(cache_module, "MIN_PARALLEL_BYTES", EXPERT_BYTES + 1)
    small = open_worker(4)
    for worker in (converted, small):
        _prefetch_and_wait(worker, (1, 2))
        assert (worker.num_resident, worker.stats.prefetched) == (0, 0)
    converted.close()
    assert not store.begun


def test_experts_of_others_are_passed_over_and_unknown_ones_refused(
    store: HeldStore, open_worker: Any
) -> None:
    worker = open_worker(4, group=[ExpertKey("model", 0, 1), ExpertKey("model", 0, 2)])
    _prefetch_and_wait(worker, (0, 2, 7))
    assert worker.resident("model", 0) == {2}
    with pytest.raises(UnknownExpert):
        open_worker().prefetch("model", 0, (99,))


@pytest.mark.parametrize("num_budget", [1, 2, 3, 5, None])
@pytest.mark.parametrize("direct", [False, True])
def test_any_guesses_leave_bits_and_budget_as_they_were(
    store: HeldStore, open_worker: Any, num_budget: int | None, direct: bool
) -> None:
    """Guesses at random, right and wrong, whenever their reads come; no waiting between hint and call."""
    chance = random.Random(num_budget or 0)
    expert_bytes = store._store.window_bytes(ExpertKey("model", 0, 0), direct=direct)
    budget = None if num_budget is None else num_budget * expert_bytes + expert_bytes // 2
    worker = open_worker(budget_bytes=budget, direct=direct, eviction=chance.choice(("lru", "lfu", "trust")))
    plain = open_worker()
    plain.load_all()
    num_uses = 0
    for seed in range(60):
        experts = sorted(chance.sample(range(NUM_EXPERTS), chance.randint(1, NUM_EXPERTS)))
        guess = chance.sample(range(NUM_EXPERTS), chance.randint(0, NUM_EXPERTS))
        call = _call(*experts, layer=chance.choice((0, 2)), seed=seed)
        worker.prefetch("model", chance.choice((0, 2)), guess)
        assert torch.equal(worker.compute(call), plain.compute(call))
        num_uses += len(experts)
        assert worker.resident_bytes == worker.num_resident * expert_bytes
        assert worker.resident_bytes <= worker.cache.allocated_bytes <= (budget or 1 << 30)
    stats = worker.stats
    assert stats.hits + stats.misses == num_uses
    assert stats.prefetched > 0
    assert stats.prefetched_used <= stats.prefetched  # how many were in time for their call is chance
