"""Two tiers of experts: the same bits at any pair of budgets, both kept, and copies that nobody overtakes.

The device is host memory here, and everything else is what runs with a real one: copies happen as late as they may.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts import cache as cache_module
from experts.buffers import PLAIN_MEMORY, HostMemory
from experts.call import ExpertCall
from experts.device_tier import TieredCache, TierOptions
from experts.devices import CPU
from experts.errors import BudgetTooSmall, ExpertCorrupt
from experts.numerics import RowKernel, calibrate
from experts.store import ExpertStore
from experts.transfers import PlainTransfers, Transfer
from experts.worker import ExpertWorker
from extraction.extract import extract
from extraction.manifest import ExpertKey
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts

WIDTH, EXPERT_WIDTH, NUM_EXPERTS = 64, 24, 8
EXPERT_BYTES = 3 * WIDTH * EXPERT_WIDTH * 4
NUM_CALLS = 40


@dataclass
class LateTransfer:
    """Copies when it is joined or waited for, so that whoever comes too early, or changes a side too early, shows."""

    source: Tensor
    target: Tensor
    copied: Tensor | None = None

    @torch.inference_mode()
    def join(self) -> None:
        if self.copied is None:
            self.copied = self.source.clone()
            self.target.copy_(self.copied)

    def wait(self) -> None:
        """Until then the host's memory may still be read from."""
        self.join()
        assert self.copied is not None and torch.equal(self.source, self.copied), (
            "written to while it was read"
        )
        self.source = self.copied


class LateTransfers:
    device = CPU
    memory: HostMemory = PLAIN_MEMORY

    def __init__(self) -> None:
        self.num_follows = 0
        self.started: list[LateTransfer] = []
        self.is_closed = False

    def follow(self) -> None:
        self.num_follows += 1

    def start(self, source: Tensor, target: Tensor) -> Transfer:
        assert source.shape == target.shape and source.dtype == target.dtype == torch.uint8
        target.fill_(255)  # not a number, whoever reads it now
        self.started.append(LateTransfer(source, target))
        return self.started[-1]

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Iterator[ExpertStore]:
    opened = ExpertStore.open(tiny_store)
    yield opened
    opened.close()


def _kernel(dtype: torch.dtype) -> RowKernel:
    return calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], dtype)


def _worker(
    store: ExpertStore,
    device_budget: int | None,
    host_budget: int | None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[ExpertWorker, TieredCache, LateTransfers]:
    transfers = LateTransfers()
    worker = ExpertWorker(
        store,
        _kernel(dtype),
        dtype,
        widths={"model": WIDTH},
        budget_bytes=device_budget,
        tiers=TierOptions(transfers, host_budget),
        **options,
    )
    assert isinstance(worker.cache, TieredCache)
    return worker, worker.cache, transfers


def _calls(dtype: torch.dtype = torch.float32) -> list[ExpertCall]:
    chance = random.Random(5)
    calls = []
    for seed in range(NUM_CALLS):
        experts = tuple(sorted(chance.sample(range(NUM_EXPERTS), chance.randint(1, NUM_EXPERTS))))
        counts = tuple(chance.randint(1, 9) for _ in experts)
        rows = tuple(chance.randrange(6) for _ in range(sum(counts)))
        tokens_TD = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
        calls.append(ExpertCall("model", chance.choice((0, 2)), experts, counts, rows, tokens_TD))
    return calls


def _untiered(store: ExpertStore, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    worker = ExpertWorker(store, _kernel(dtype), dtype, widths={"model": WIDTH})
    answers = [worker.compute(call) for call in _calls(dtype)]
    worker.close()
    return answers


@pytest.mark.parametrize("device_experts", [1, 3, 9, None])
@pytest.mark.parametrize("host_experts", [1, 2, 7, None])
def test_any_pair_of_budgets_gives_the_same_bits_within_both(
    store: ExpertStore, device_experts: int | None, host_experts: int | None
) -> None:
    budgets = [None if count is None else count * EXPERT_BYTES for count in (device_experts, host_experts)]
    worker, cache, transfers = _worker(store, *budgets)
    for call, expected in zip(_calls(), _untiered(store), strict=True):
        assert torch.equal(worker.compute(call), expected)
        for used, budget in zip((cache.allocated_bytes, cache.host_allocated_bytes), budgets, strict=True):
            assert budget is None or used <= budget
        assert cache.resident_bytes == len(cache) * EXPERT_BYTES <= cache.allocated_bytes
    stats = worker.stats
    assert stats.behind is not None
    assert stats.behind.hits + stats.behind.misses == stats.misses == len(transfers.started)
    assert stats.behind.bytes_moved == stats.misses * EXPERT_BYTES
    assert stats.bytes_read == stats.behind.misses * EXPERT_BYTES
    worker.close()
    assert transfers.is_closed


@pytest.mark.parametrize("is_large", [False, True])
def test_experts_that_are_read_beside_give_the_same_bits(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    if is_large:
        monkeypatch.setattr(cache_module, "MIN_PARALLEL_BYTES", 1)
    direct = 2 * 4096  # what blocks past the page cache hold beside a record
    worker, cache, _ = _worker(store, 3 * EXPERT_BYTES, 2 * (EXPERT_BYTES + direct))
    for call, expected in zip(_calls(), _untiered(store), strict=True):
        worker.prefetch("model", call.layer, range(NUM_EXPERTS))
        assert torch.equal(worker.compute(call), expected)
        assert cache.host_allocated_bytes <= 2 * (EXPERT_BYTES + direct)
    assert (worker.stats.prefetched > 0) == is_large
    worker.close()


def test_experts_that_become_another_dtype_are_converted_behind_the_link(store: ExpertStore) -> None:
    dtype = torch.bfloat16
    worker, cache, transfers = _worker(store, 2 * EXPERT_BYTES // 2, 3 * EXPERT_BYTES, dtype)
    for call, expected in zip(_calls(dtype), _untiered(store, dtype), strict=True):
        assert torch.equal(worker.compute(call), expected)
    assert {part.source.numel() for part in transfers.started} == {EXPERT_BYTES}, "as they are stored"
    assert cache.resident_bytes == len(cache) * EXPERT_BYTES // 2
    worker.close()


def test_quantised_experts_pass_the_link_as_codes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    extract(tiny_checkpoint, root, quantised=QuantisedParts(Quantization(scheme="int4", group_size=32)))
    quantised = ExpertStore.open(root)
    expected = _untiered(quantised)
    nbytes = quantised.record(quantised.expert_keys()[0]).nbytes
    worker, _, transfers = _worker(quantised, 3 * nbytes + 4000, 2 * nbytes)
    for call, rows in zip(_calls(), expected, strict=True):
        assert torch.equal(worker.compute(call), rows)
    assert {part.source.numel() for part in transfers.started} == {nbytes}
    worker.close()
    quantised.close()


def test_copies_wait_for_what_was_computed_in_their_memory_before(store: ExpertStore) -> None:
    """Once for every wave that something is copied for."""
    worker, _, transfers = _worker(store, None, None)
    calls = _calls()
    worker.compute(calls[0])
    assert transfers.num_follows == 1
    worker.compute(calls[0])
    assert transfers.num_follows == 1, "all there"
    worker.close()


@pytest.mark.parametrize(("device_budget", "host_budget"), [(EXPERT_BYTES - 1, None), (None, 7)])
def test_below_one_expert_is_refused_with_both_numbers(
    store: ExpertStore, device_budget: int | None, host_budget: int | None
) -> None:
    worker, cache, _ = _worker(store, device_budget, host_budget)
    with pytest.raises(BudgetTooSmall, match=str(EXPERT_BYTES)):
        worker.compute(_calls()[0])
    assert (len(cache), cache.resident_bytes) == (0, 0)
    worker.close()


def test_failed_read_leaves_nothing_behind_and_later_calls_right(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, cache, _ = _worker(store, 5 * EXPERT_BYTES, 3 * EXPERT_BYTES)
    read = ExpertStore.read_into

    def fail(self: ExpertStore, key: ExpertKey, window: Tensor, *, direct: bool = False) -> Tensor:
        if key.expert == 4:
            raise ExpertCorrupt(str(tuple(key)), "experts.bin", 0, "the bytes were altered")
        return read(self, key, window, direct=direct)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertStore, "read_into", fail)
        tokens = torch.ones(1, WIDTH)
        with pytest.raises(ExpertCorrupt):
            worker.compute(ExpertCall("model", 0, (0, 1, 4, 5), (1, 1, 1, 1), (0, 0, 0, 0), tokens))
    assert 4 not in worker.resident("model", 0)
    assert cache.resident_bytes == len(cache) * EXPERT_BYTES
    for call, expected in zip(_calls(), _untiered(store), strict=True):
        assert torch.equal(worker.compute(call), expected)
        assert cache.allocated_bytes <= 5 * EXPERT_BYTES
    worker.close()


def test_budget_that_shrinks_gives_memory_back_and_changes_no_bit(store: ExpertStore) -> None:
    worker, cache, _ = _worker(store, 6 * EXPERT_BYTES, 2 * EXPERT_BYTES)
    for turn, (call, expected) in enumerate(zip(_calls(), _untiered(store), strict=True)):
        worker.set_budget((6, 1, 4)[turn % 3] * EXPERT_BYTES)
        assert cache.allocated_bytes <= (6, 1, 4)[turn % 3] * EXPERT_BYTES
        assert torch.equal(worker.compute(call), expected)
    with pytest.raises(ValueError, match="without a bound"):
        _worker(store, None, None)[0].set_budget(EXPERT_BYTES)
    worker.close()


def test_plain_transfers_copy_at_once() -> None:
    transfers = PlainTransfers(CPU)
    source, target = torch.arange(9, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    transfers.follow()
    copy = transfers.start(source, target)
    assert torch.equal(source, target)
    copy.join()
    copy.wait()
    transfers.close()


def test_group_is_loaded_as_far_as_the_device_holds_it(store: ExpertStore) -> None:
    worker, cache, _ = _worker(store, 5 * EXPERT_BYTES, EXPERT_BYTES)
    worker.load_all()
    assert (len(cache), cache.group_bytes) == (5, len(store.expert_keys()) * EXPERT_BYTES)
    assert worker.stats.hit_rates
    worker.close()
