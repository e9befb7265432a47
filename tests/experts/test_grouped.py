"""Grouped matmul: rows of experts that lie side by side, as those of each expert by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.call import ExpertCall
from experts.device_proof import sound_groupings
from experts.device_tier import TieredCache, TierOptions
from experts.devices import CPU
from experts.ffn import compute_experts, view_expert
from experts.grouped import compute_groups, view_stack
from experts.numerics import RowKernel
from experts.store import ExpertStore
from experts.transfers import PlainTransfers
from experts.worker import ExpertWorker

WIDTH, EXPERT_WIDTH, NUM_EXPERTS = 64, 24, 8
EXPERT_BYTES = 3 * WIDTH * EXPERT_WIDTH * 4
BLOCKS = RowKernel(64, "blocks", norm="halves")
GROUPED = replace(BLOCKS, grouping="grouped")


def _call(layer: int = 0) -> ExpertCall:
    counts = (3, 70, 1)
    rows = tuple(row % 9 for row in range(sum(counts)))
    tokens_TD = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    return ExpertCall("model", layer, (1, 4, 7), counts, rows, tokens_TD)


def test_stack_s_matrices_are_those_of_its_records() -> None:
    records = torch.randn(3, 3 * WIDTH * EXPERT_WIDTH).view(torch.uint8)
    stack = view_stack(records, torch.float32, WIDTH)
    for index, record in enumerate(records):
        gate_up, down = view_expert(record, torch.float32, WIDTH).as_tensors()
        assert torch.equal(stack.gate_up_EFD[index], gate_up) and torch.equal(stack.down_EDF[index], down)
        assert stack.gate_up_EFD[index].data_ptr() == gate_up.data_ptr(), "nothing is copied"


def test_rows_go_to_the_experts_at_their_places() -> None:
    records = torch.randn(4, 3 * WIDTH * EXPERT_WIDTH, generator=torch.Generator().manual_seed(2)).mul_(0.1)
    stack = view_stack(records.view(torch.uint8), torch.float32, WIDTH)
    x_PD = torch.randn(192, WIDTH, generator=torch.Generator().manual_seed(3))
    found = compute_groups(x_PD, [64, 128], [1, 3], stack)
    for place, rows in ((1, slice(0, 64)), (3, slice(64, 192))):
        expert = view_expert(records[place].view(torch.uint8), torch.float32, WIDTH)
        call = ExpertCall("model", 0, (0,), (len(x_PD[rows]),), tuple(range(len(x_PD[rows]))), x_PD[rows])
        assert torch.allclose(found[rows], compute_experts(call, [expert], BLOCKS), atol=1e-5)


@pytest.mark.parametrize("num_experts", [None, 2, 24])
def test_worker_stacks_experts_where_the_device_holds_all(tiny_store: Path, num_experts: int | None) -> None:
    store = ExpertStore.open(tiny_store)
    budget = None if num_experts is None else num_experts * EXPERT_BYTES
    tiers = TierOptions(PlainTransfers(CPU))
    worker, plain = (
        ExpertWorker(store, kernel, torch.float32, widths={"model": WIDTH}, budget_bytes=budget, tiers=tiers)
        for kernel in (GROUPED, BLOCKS)
    )
    cache = worker.cache
    assert isinstance(cache, TieredCache)
    for layer in (0, 2, 0):
        found = worker.compute(_call(layer))
        assert torch.allclose(found, plain.compute(_call(layer)), atol=1e-5)
        stacks = {expert.stack for expert in cache.weights.values()}
        assert (None in stacks) == (num_experts == 2)
        assert budget is None or cache.allocated_bytes <= budget
    if num_experts == 24:
        before = worker.compute(_call())
        worker.set_budget(2 * EXPERT_BYTES)
        assert cache.allocated_bytes <= 2 * EXPERT_BYTES and cache.resident_bytes <= 2 * EXPERT_BYTES
        assert torch.allclose(worker.compute(_call()), before, atol=1e-5)
        worker.set_budget(24 * EXPERT_BYTES)
        assert torch.allclose(worker.compute(_call()), before, atol=1e-5)
    worker.close()
    plain.close()
    store.close()


def test_the_class_names_the_product() -> None:
    assert (BLOCKS.name, GROUPED.name) == ("blocks64-1", "blocks64-grouped-1")


def test_a_device_that_is_full_decides_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: type[RuntimeError]) -> None:
        def grouped_mm(*_: object, **__: object) -> torch.Tensor:
            raise error("not here")

        monkeypatch.setattr("experts.grouped.grouped_mm", grouped_mm)

    fail(RuntimeError)
    assert next(sound_groupings(WIDTH, EXPERT_WIDTH, BLOCKS, torch.float32)) == ""
    fail(torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        next(sound_groupings(WIDTH, EXPERT_WIDTH, BLOCKS, torch.float32))
