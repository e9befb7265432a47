"""Budgets as users give them, and what they come to in bytes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.budget import FIT, BudgetRequest, ExpertBytes, measure_experts, resolve_budget
from experts.errors import BudgetTooSmall
from experts.numerics import RowKernel
from experts.store import ExpertStore
from experts.worker import ExpertWorker

EXPERTS = ExpertBytes(total=4000, largest=100)
QUARTER = BudgetRequest(share=Fraction(1, 4))


@pytest.mark.parametrize(
    ("requests", "num_bytes"),
    [
        ((BudgetRequest(num_bytes=700),), 700),
        ((BudgetRequest(num_bytes=100),), 100),
        ((BudgetRequest(num_bytes=10**9),), 10**9),
        ((QUARTER,), 1000),
        ((BudgetRequest(share=Fraction(1, 3)),), 1333),
        ((FIT,), 2500),
        ((QUARTER, BudgetRequest(num_bytes=5)), 1005),
        ((QUARTER, FIT), 2500),
    ],
)
def test_requests_of_all_tiers_are_added_up_and_fit_is_the_room(
    requests: tuple[BudgetRequest, ...], num_bytes: int
) -> None:
    assert resolve_budget(requests, EXPERTS, room_bytes=2500) == num_bytes


@pytest.mark.parametrize(
    ("request_", "room", "found"),
    [
        (BudgetRequest(num_bytes=99), 2500, 99),
        (BudgetRequest(share=Fraction(1, 1000)), 2500, 4),
        (FIT, 99, 99),
        (FIT, -5, 0),
    ],
)
def test_budget_below_one_expert_is_refused_with_both_numbers(
    request_: BudgetRequest, room: int, found: int
) -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        resolve_budget([request_], EXPERTS, room)
    assert str(caught.value) == f"budget of {found} bytes is below one expert (100 bytes)"


@given(st.fractions(min_value=Fraction(1, 40), max_value=1), st.integers(100, 2**50))
def test_share_never_exceeds_its_part_of_the_experts(share: Fraction, total: int) -> None:
    resolved = resolve_budget([BudgetRequest(share=share)], ExpertBytes(total, 1), 0)
    assert resolved <= total * share < resolved + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_bytes_are_those_that_a_worker_holds_with_everything_loaded(
    stories_store: Path, dtype: torch.dtype
) -> None:
    store = ExpertStore.open(stories_store)
    name, width = store.served.name, store.served.config["hidden_size"]
    worker = ExpertWorker(store, RowKernel(1), dtype, widths={name: width})
    worker.load_all()
    experts = measure_experts(map(store.record, store.expert_keys(name)), dtype)
    assert experts == ExpertBytes(worker.resident_bytes, worker.resident_bytes // worker.num_resident)
    store.close()
