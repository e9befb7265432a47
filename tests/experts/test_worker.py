"""The expert worker: the same bits under any budget, and a budget that holds at every moment."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

from experts.call import ExpertCall
from experts.errors import BudgetTooSmall, ExpertCorrupt, NotInGroup, UnknownExpert
from experts.ffn import compute_experts, view_expert
from experts.numerics import RowKernel, calibrate
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey

WIDTH, EXPERT_WIDTH, NUM_EXPERTS = 64, 24, 8
EXPERT_BYTES = 3 * WIDTH * EXPERT_WIDTH * 4
LAYERS = (0, 2)


class WatchedStore:
    """A store that knows which of the buffers it read into still exist, and fails where it is told to."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self._live: dict[int, int] = {}
        self._lock = threading.Lock()
        self.most_bytes = 0
        self.num_reads = 0
        self.failing: set[int] = set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    @property
    def live_bytes(self) -> int:
        with self._lock:
            return sum(self._live.values())

    def read_into(self, key: ExpertKey, window: torch.Tensor, *, direct: bool = False) -> torch.Tensor:
        memory = id(window)
        with self._lock:
            is_new = memory not in self._live
            self._live[memory] = window.nbytes
            self.most_bytes = max(self.most_bytes, sum(self._live.values()))
        if is_new:
            weakref.finalize(window, self._forget, memory)
        if key.expert in self.failing:
            raise ExpertCorrupt(str(tuple(key)), "experts.bin", 0, "the bytes were altered")
        self.num_reads += 1
        return self._store.read_into(key, window, direct=direct)

    def _forget(self, memory: int) -> None:
        with self._lock:
            del self._live[memory]


@pytest.fixture(scope="module")
def opened(tiny_store: Path) -> Iterator[ExpertStore]:
    store = ExpertStore.open(tiny_store)
    yield store
    store.close()


@pytest.fixture(scope="module")
def kernel() -> RowKernel:
    return calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], torch.float32)


@pytest.fixture
def store(opened: ExpertStore) -> WatchedStore:
    return WatchedStore(opened)


def _worker(
    store: WatchedStore,
    kernel: RowKernel,
    budget_bytes: int | None = None,
    group: list[ExpertKey] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    has_guests: bool = False,
    is_resizable: bool = True,
) -> ExpertWorker:
    return ExpertWorker(
        cast(ExpertStore, store),
        kernel,
        dtype,
        widths={"model": WIDTH},
        group=group,
        budget_bytes=budget_bytes,
        has_guests=has_guests,
        is_resizable=is_resizable,
    )


def _call(chance: random.Random, dtype: torch.dtype = torch.float32) -> ExpertCall:
    experts = sorted(chance.sample(range(NUM_EXPERTS), chance.randint(1, NUM_EXPERTS)))
    counts = [chance.randint(1, 11) for _ in experts]
    num_tokens = chance.randint(1, 20)
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    tokens = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
    rows = tuple(chance.randrange(num_tokens) for _ in range(sum(counts)))
    call = ExpertCall("model", chance.choice(LAYERS), tuple(experts), tuple(counts), rows, tokens)
    call.validate()
    return call


def _key(call: ExpertCall, expert: int) -> ExpertKey:
    return ExpertKey(call.component, call.layer, expert)


def _reference(store: WatchedStore, kernel: RowKernel, call: ExpertCall) -> torch.Tensor:
    """Straight from the store, without a worker."""
    raw = [store._store.read_expert(_key(call, expert)) for expert in call.experts]
    return compute_experts(call, [view_expert(record, torch.float32, WIDTH) for record in raw], kernel)


@pytest.mark.parametrize("num_budget", [1, 2, 3, 5, 7, 16, None])
def test_waves_under_any_budget_give_the_same_bits_and_stay_within_it(
    store: WatchedStore, kernel: RowKernel, num_budget: int | None
) -> None:
    """A budget that is no whole number of experts, too: half an expert more must not be used."""
    budget = None if num_budget is None else num_budget * EXPERT_BYTES + EXPERT_BYTES // 2
    worker = _worker(store, kernel, budget)
    chance = random.Random(num_budget)
    for _ in range(25):
        call = _call(chance)
        assert torch.equal(worker.compute(call), _reference(store, kernel, call))
        assert worker.resident_bytes == store.live_bytes == worker.num_resident * EXPERT_BYTES
    assert store.most_bytes <= (num_budget or 2 * NUM_EXPERTS) * EXPERT_BYTES
    stats = worker.stats
    assert stats.misses == store.num_reads
    assert stats.bytes_read == store.num_reads * EXPERT_BYTES
    assert stats.calls == 25
    if num_budget in (16, None):
        assert stats.misses == len(stats.experts_used), "nothing is read twice where everything fits"


def test_budget_that_changes_between_calls_holds_at_once_and_changes_no_bit(
    store: WatchedStore, kernel: RowKernel
) -> None:
    worker = _worker(store, kernel, 7 * EXPERT_BYTES)
    chance = random.Random(3)
    for _ in range(40):
        asked = chance.randint(0, 9) * EXPERT_BYTES
        worker.set_budget(asked)
        budget = min(max(asked, EXPERT_BYTES), 7 * EXPERT_BYTES)
        assert worker.budget_bytes == budget
        assert worker.resident_bytes <= store.live_bytes == worker.cache.allocated_bytes <= budget
        call = _call(chance)
        assert torch.equal(worker.compute(call), _reference(store, kernel, call))
        assert worker.resident_bytes == store.live_bytes <= budget


def test_budget_of_a_worker_without_bound_cannot_be_set(store: WatchedStore, kernel: RowKernel) -> None:
    with pytest.raises(ValueError, match="without a bound"):
        _worker(store, kernel).set_budget(EXPERT_BYTES)


@pytest.mark.parametrize("num_budget", [15, 16, None])
def test_budget_that_holds_everything_and_stays_is_no_bound(
    store: WatchedStore, kernel: RowKernel, num_budget: int | None
) -> None:
    """Then all is read ahead of calls, once, which is no miss, and stays for good; with one expert less nothing is."""
    whole = num_budget != 15
    budget = None if num_budget is None else num_budget * EXPERT_BYTES
    worker = _worker(store, kernel, budget, is_resizable=False)
    num_ahead = 0
    while worker.load_more():
        num_ahead += 1
    assert num_ahead == store.num_reads == worker.num_resident == (2 * NUM_EXPERTS if whole else 0)
    assert worker.budget_bytes == budget and worker.stats.misses == 0
    assert (worker.cache.for_good([ExpertKey("model", 0, 3)]) is not None) is whole
    call = _call(random.Random(2))
    assert torch.equal(worker.compute(call), _reference(store, kernel, call))
    if whole:
        assert (worker.stats.misses, worker.stats.hits) == (0, len(call.experts))
        with pytest.raises(ValueError, match="without a bound"):
            worker.set_budget(EXPERT_BYTES)


def test_expert_that_cannot_be_read_ahead_is_left_to_who_asks_for_it(
    store: WatchedStore, kernel: RowKernel
) -> None:
    store.failing = {3}
    worker = _worker(store, kernel)
    num_ahead = sum(iter(worker.load_more, False))
    assert num_ahead == worker.num_resident == 2 * (NUM_EXPERTS - 1)
    with pytest.raises(ExpertCorrupt):
        worker.compute(ExpertCall("model", 0, (3,), (1,), (0,), torch.zeros(1, WIDTH)))
    store.failing = set()
    worker.compute(ExpertCall("model", 0, (3,), (1,), (0,), torch.zeros(1, WIDTH)))


def test_reading_ahead_ends_where_there_is_no_memory(
    store: WatchedStore, kernel: RowKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = _worker(store, kernel)

    def full(*given: object, **more: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(worker.cache._pool, "take", full)
        assert not worker.load_more()
    call = _call(random.Random(4))
    assert torch.equal(worker.compute(call), _reference(store, kernel, call))


def test_failed_load_leaves_the_books_right(store: WatchedStore, kernel: RowKernel) -> None:
    budget = 4 * EXPERT_BYTES
    worker = _worker(store, kernel, budget)
    chance = random.Random(1)
    for attempt in range(12):
        call = _call(chance)
        store.failing = {attempt % NUM_EXPERTS}
        if store.failing & set(call.experts):
            # It may be resident from an earlier call; then there is nothing to read.
            try:
                worker.compute(call)
            except ExpertCorrupt as error:
                assert str(attempt % NUM_EXPERTS) in error.key
        assert worker.resident_bytes <= store.live_bytes == worker.cache.allocated_bytes <= budget
        store.failing = set()
        assert torch.equal(worker.compute(call), _reference(store, kernel, call))
    assert store.most_bytes <= budget


def test_failed_load_raises_and_the_next_call_computes(store: WatchedStore, kernel: RowKernel) -> None:
    worker = _worker(store, kernel, 3 * EXPERT_BYTES)
    call = ExpertCall("model", 0, (1, 4, 6), (1, 1, 1), (0, 0, 0), torch.ones(1, WIDTH))
    store.failing = {4}
    with pytest.raises(ExpertCorrupt):
        worker.compute(call)
    assert worker.num_resident == 1
    assert worker.resident_bytes == EXPERT_BYTES
    assert store.live_bytes == 2 * EXPERT_BYTES, "the buffer of the one that failed is kept for the next"
    store.failing = set()
    assert torch.equal(worker.compute(call), _reference(store, kernel, call))
    assert worker.num_resident == 3


def test_residents_of_a_layer_are_those_in_memory_now(store: WatchedStore, kernel: RowKernel) -> None:
    worker = _worker(store, kernel, 3 * EXPERT_BYTES)
    assert worker.resident("model", 0) == frozenset()
    for layer, experts in ((0, (1, 4)), (2, (6,)), (0, (4, 5))):
        counts = (1,) * len(experts)
        tokens = (0,) * len(experts)
        worker.compute(ExpertCall("model", layer, experts, counts, tokens, torch.ones(1, WIDTH)))
    assert worker.resident("model", 0) == {4, 5}
    assert worker.resident("model", 2) == {6}
    store.failing = {7}
    with pytest.raises(ExpertCorrupt):
        worker.compute(ExpertCall("model", 2, (7,), (1,), (0,), torch.ones(1, WIDTH)))
    assert 7 not in worker.resident("model", 2)


def test_expert_of_another_group_is_refused_before_anything_is_read(
    store: WatchedStore, kernel: RowKernel
) -> None:
    worker = _worker(store, kernel, group=[ExpertKey("model", 0, expert) for expert in (0, 1)])
    tokens = torch.ones(1, WIDTH)
    with pytest.raises(NotInGroup, match=r"\('model', 0, 2\) does not belong"):
        worker.compute(ExpertCall("model", 0, (1, 2), (1, 1), (0, 0), tokens))
    with pytest.raises(NotInGroup):
        worker.compute(ExpertCall("model", 2, (0,), (1,), (0,), tokens))
    assert store.num_reads == 0
    worker.compute(ExpertCall("model", 0, (0, 1), (1, 1), (0, 0), tokens))


def test_component_of_unknown_width_and_expert_beyond_the_last_are_refused(
    store: WatchedStore, kernel: RowKernel
) -> None:
    worker = _worker(store, kernel)
    with pytest.raises(NotInGroup, match="talker"):
        worker.compute(ExpertCall("talker", 0, (0,), (1,), (0,), torch.ones(1, WIDTH)))
    with pytest.raises(UnknownExpert, match="99"):
        worker.compute(ExpertCall("model", 0, (99,), (1,), (0,), torch.ones(1, WIDTH)))
    assert worker.resident_bytes == 0


def test_budget_below_one_expert_is_refused_with_both_numbers(store: WatchedStore, kernel: RowKernel) -> None:
    worker = _worker(store, kernel, EXPERT_BYTES - 1)
    with pytest.raises(BudgetTooSmall) as refused:
        worker.compute(ExpertCall("model", 0, (0,), (1,), (0,), torch.ones(1, WIDTH)))
    assert (refused.value.budget_bytes, refused.value.expert_bytes) == (EXPERT_BYTES - 1, EXPERT_BYTES)
    worker.load_all()
    assert (store.num_reads, worker.resident_bytes) == (0, 0)


def test_loading_ahead_reads_the_group_up_to_the_budget(store: WatchedStore, kernel: RowKernel) -> None:
    group = [ExpertKey("model", 2, expert) for expert in range(NUM_EXPERTS)]
    worker = _worker(store, kernel, 5 * EXPERT_BYTES + 1, group)
    worker.load_all()
    assert (worker.num_resident, store.live_bytes) == (5, 5 * EXPERT_BYTES)
    everything = _worker(store, kernel, group=group)
    everything.load_all()
    everything.load_all()
    assert everything.num_resident == NUM_EXPERTS
    assert everything.stats.misses == NUM_EXPERTS


def test_loading_ahead_passes_over_components_of_other_widths(store: WatchedStore, kernel: RowKernel) -> None:
    worker = ExpertWorker(cast(ExpertStore, store), kernel, torch.float32, widths={"talker": 32})
    worker.load_all()
    assert worker.num_resident == 0


def test_experts_converted_to_another_dtype_count_in_that_dtype(
    store: WatchedStore, kernel: RowKernel
) -> None:
    converted = EXPERT_BYTES // 2
    kernel = calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], torch.bfloat16)
    whole = _worker(store, kernel, dtype=torch.bfloat16)
    worker = _worker(store, kernel, 2 * converted, dtype=torch.bfloat16)
    chance = random.Random(4)
    for _ in range(5):
        call = _call(chance, torch.bfloat16)
        rows = worker.compute(call)
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, whole.compute(call))
        assert worker.resident_bytes == worker.num_resident * converted <= 2 * converted
    assert store.live_bytes == 0, "the stored form is not kept beside the converted one"


def test_calls_from_several_threads_get_their_own_rows(store: WatchedStore, kernel: RowKernel) -> None:
    worker = _worker(store, kernel, 3 * EXPERT_BYTES)
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for number in range(12):
            call = _call(chance)
            if not torch.equal(worker.compute(call), _reference(store, kernel, call)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert worker.stats.calls == 48
    assert store.most_bytes <= 3 * EXPERT_BYTES
    assert worker.resident_bytes == store.live_bytes


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"counts": (1,)}, "2 experts but 1 counts"),
        ({"experts": (3, 1)}, "not distinct and ascending"),
        ({"experts": (3, 3)}, "not distinct and ascending"),
        ({"counts": (0, 2)}, "do not cover"),
        ({"counts": (1, 2)}, "do not cover"),
        ({"token_of_R": (0, 2)}, "reaches outside"),
        ({"token_of_R": (-1, 0)}, "reaches outside"),
        ({"experts": (), "counts": (), "token_of_R": ()}, "asks for no rows"),
    ],
)
def test_call_whose_fields_disagree_is_refused(fields: dict[str, tuple[int, ...]], reason: str) -> None:
    good = {"experts": (1, 3), "counts": (1, 1), "token_of_R": (0, 1)}
    call = ExpertCall("model", 0, tokens_TD=torch.ones(2, WIDTH), **(good | fields))
    with pytest.raises(ValueError, match=reason):
        call.validate()


@pytest.mark.parametrize("num_budget", [1, 3, 5, None])
def test_guests_have_the_same_bits_and_share_the_budget(
    store: WatchedStore, kernel: RowKernel, num_budget: int | None
) -> None:
    """A worker that stands in for a lost actor computes experts outside of its group."""
    group = [ExpertKey("model", layer, expert) for layer in LAYERS for expert in (0, 1, 2)]
    budget = None if num_budget is None else num_budget * EXPERT_BYTES
    worker = _worker(store, kernel, budget, group, has_guests=True)
    assert worker.group_bytes == len(group) * EXPERT_BYTES
    chance = random.Random(num_budget)
    for _ in range(25):
        call = _call(chance)
        assert torch.equal(worker.compute(call), _reference(store, kernel, call))
        assert worker.resident_bytes == store.live_bytes
        if num_budget is None:
            here = {(layer, e) for layer in LAYERS for e in worker.resident("model", layer)}
            assert here <= {(key.layer, key.expert) for key in group}, "without a budget guests leave at once"
    if num_budget is not None:
        assert store.most_bytes <= num_budget * EXPERT_BYTES


def test_guests_are_not_read_before_they_are_asked_for(store: WatchedStore, kernel: RowKernel) -> None:
    group = [ExpertKey("model", 0, 0), ExpertKey("model", 2, 5)]
    worker = _worker(store, kernel, None, group, has_guests=True)
    worker.load_all()
    worker.prefetch("model", 0, [1, 2])
    assert worker.num_resident == store.num_reads == 2


def test_guest_that_cannot_be_read_leaves_nothing_behind(store: WatchedStore, kernel: RowKernel) -> None:
    worker = _worker(store, kernel, None, [ExpertKey("model", 0, 0)], has_guests=True)
    store.failing = {3}
    with pytest.raises(ExpertCorrupt):
        worker.compute(ExpertCall("model", 0, (0, 2, 3), (1, 1, 1), (0, 0, 0), torch.ones(1, WIDTH)))
    assert worker.resident("model", 0) <= {0}


def test_table_of_a_layer_is_there_once_all_its_experts_are_and_its_use_is_counted(
    store: WatchedStore, kernel: RowKernel
) -> None:
    if kernel.product != "native":
        pytest.skip("native products are not built here")
    worker = _worker(store, kernel)
    assert worker.table("model", 0) is None
    worker.load_all()
    table = worker.table("model", 0)
    assert table is not None and worker.table("model", 0) is table
    assert [key.expert for key in table.keys] == list(range(NUM_EXPERTS))
    assert worker.table("model", 1) is None  # which has no experts
    worker.note_use(table, [2, 5], 7)
    assert (worker.stats.calls, worker.stats.rows, worker.stats.hits) == (1, 7, 2)
    assert worker.stats.experts_used == {ExpertKey("model", 0, 2), ExpertKey("model", 0, 5)}


def test_experts_that_may_go_have_no_table(store: WatchedStore, kernel: RowKernel) -> None:
    worker = _worker(store, kernel, budget_bytes=1 << 30)
    worker.load_all()
    assert worker.table("model", 0) is None
