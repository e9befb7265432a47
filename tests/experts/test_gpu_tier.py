"""Experts on a GPU, where there is one: pinned host memory, copies on their own stream, the same bits at any budgets.

tests/experts/test_device_tier.py holds the same code on machines without one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.call import ExpertCall
from experts.device_tier import TieredCache, TierOptions
from experts.devices import settle_arithmetic
from experts.numerics import RowKernel, calibrate
from experts.store import ExpertStore
from experts.transfers import CudaTransfers, PinnedMemory
from experts.worker import ExpertWorker
from tests.gpu import GPU

pytestmark = GPU
DEVICE = torch.device("cuda", 0)
WIDTH, EXPERT_WIDTH, NUM_EXPERTS = 64, 24, 8
EXPERT_BYTES = 3 * WIDTH * EXPERT_WIDTH * 4
MIB = 1 << 20


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Iterator[ExpertStore]:
    opened = ExpertStore.open(tiny_store)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def kernel() -> RowKernel:
    settle_arithmetic(DEVICE)
    return calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], torch.float32, DEVICE)


def _worker(
    store: ExpertStore, kernel: RowKernel, device_budget: int | None, host_budget: int | None
) -> ExpertWorker:
    tiers = TierOptions(CudaTransfers(DEVICE), host_budget)
    return ExpertWorker(
        store, kernel, torch.float32, widths={"model": WIDTH}, budget_bytes=device_budget, tiers=tiers
    )


def _calls() -> list[ExpertCall]:
    chance = random.Random(5)
    calls = []
    for seed in range(60):
        experts = tuple(sorted(chance.sample(range(NUM_EXPERTS), chance.randint(1, NUM_EXPERTS))))
        counts = tuple(chance.randint(1, 90) for _ in experts)
        rows = tuple(chance.randrange(6) for _ in range(sum(counts)))
        tokens_TD = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        calls.append(ExpertCall("model", chance.choice((0, 2)), experts, counts, rows, tokens_TD))
    return calls


def test_any_pair_of_budgets_gives_the_same_bits_within_both(store: ExpertStore, kernel: RowKernel) -> None:
    calls = _calls()
    whole = _worker(store, kernel, None, None)
    expected = [whole.compute(call) for call in calls]
    for device_experts, host_experts in ((1, 1), (3, 2), (9, 7), (2, 99)):
        budgets = device_experts * EXPERT_BYTES, host_experts * EXPERT_BYTES
        worker = _worker(store, kernel, *budgets)
        cache = worker.cache
        assert isinstance(cache, TieredCache)
        answers = []
        for call in calls:  # without waiting for the GPU between them
            answers.append(worker.compute(call))
            assert cache.allocated_bytes <= budgets[0] and cache.host_allocated_bytes <= budgets[1]
        for found, wanted in zip(answers, expected, strict=True):
            assert torch.equal(found, wanted)
        worker.close()
    whole.close()


def test_host_memory_is_pinned_to_the_byte_and_let_go() -> None:
    memory = PinnedMemory(DEVICE)
    buffer = memory.take(5 * MIB + 8192, is_aligned=True)
    assert buffer.is_pinned() and buffer.numel() == 5 * MIB + 8192
    memory.release(buffer)
    assert not buffer.is_pinned()
    small = memory.take(1000, is_aligned=False)
    assert small.is_pinned()
    memory.close()
    assert not small.is_pinned()


def test_copies_wait_for_earlier_work_and_later_work_for_copies() -> None:
    """Large enough that whoever did not wait would be seen."""
    transfers = CudaTransfers(DEVICE)
    source = transfers.memory.take(64 * MIB, is_aligned=True)
    target = torch.zeros(64 * MIB, dtype=torch.uint8, device=DEVICE)
    big = torch.randn(4096, 4096, device=DEVICE)
    for turn in range(1, 5):
        source.fill_(turn)
        for _ in range(20):
            big = torch.mm(big, big).mul_(1e-4)
        before = target.clone()  # of the turn before, though the copy is asked for while it is not yet done
        transfers.follow()
        copy = transfers.start(source, target)
        copy.join()
        after = target.clone()
        copy.wait()
        assert int(before.max()) == int(before.min()) == turn - 1
        assert int(after.max()) == int(after.min()) == turn
    transfers.close()
