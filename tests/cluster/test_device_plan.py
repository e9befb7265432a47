"""A device's memory and the host's behind it, divided."""

from __future__ import annotations

from fractions import Fraction

import pytest

from cluster.device_plan import PASSING_EXPERTS, plan_device
from cluster.errors import NodeTooSmall
from cluster.memory_plan import BaseMemory, MemoryPlan, Node
from experts.budget import FIT, BudgetRequest, ExpertBytes
from experts.errors import BudgetTooSmall
from experts.node_memory import NodeMemory
from router.footprint import LIBRARY_BYTES, Footprint

MIB = 1 << 20
EXPERTS = ExpertBytes(total=4000 * MIB, largest=10 * MIB)
STORED = ExpertBytes(total=2000 * MIB, largest=5 * MIB)
FOOTPRINT = Footprint(
    backbone_bytes=500 * MIB,
    kv_bytes=300 * MIB,
    swap_bytes=200 * MIB,
    buffer_bytes=100 * MIB,
    actor_buffer_bytes=50 * MIB,
    experts=EXPERTS,
    experts_per_token=8,
)
BASE = BaseMemory(router=1000 * MIB, others=400 * MIB)


def _plan(
    *host: BudgetRequest, experts: BudgetRequest = FIT, device_mib: int = 2500, host_mib: int = 3000
) -> MemoryPlan:
    device = Node("cuda:0", (), NodeMemory(10_000 * MIB, device_mib * MIB))
    node = Node("n1", (), NodeMemory(10_000 * MIB, host_mib * MIB))
    return plan_device((experts,), host, FOOTPRINT, STORED, device, node, BASE)


def test_device_has_backbone_cache_and_buffers_and_the_host_what_is_swapped_out() -> None:
    plan = _plan()
    assert plan.behind is not None
    assert plan.budget_bytes == plan.router.budget_bytes == (2500 - 500 - 300 - 100 - 1000) * MIB
    assert (plan.router.tier, plan.router.node, plan.router.swap_bytes) == ("device", "cuda:0", 0)
    assert plan.behind.budget_bytes == (3000 - 1400 - 200 - 1000) * MIB - LIBRARY_BYTES
    assert (plan.behind.tier, plan.behind.node, plan.behind.backbone_bytes) == ("host", "n1", 0)
    assert [row["tier"] for row in plan.as_json()["processes"]] == ["device", "host"]


def test_host_takes_no_more_than_the_store_has_and_little_where_the_device_holds_all() -> None:
    plan = _plan(host_mib=9000)
    assert plan.behind is not None and plan.behind.budget_bytes == STORED.total
    plan = _plan(device_mib=9000, host_mib=9000)
    assert plan.budget_bytes == EXPERTS.total
    assert plan.behind is not None and plan.behind.budget_bytes == PASSING_EXPERTS * STORED.largest


def test_what_is_asked_for_is_taken_at_its_word() -> None:
    half, size = BudgetRequest(share=Fraction(1, 2)), BudgetRequest(num_bytes=77 * MIB)
    plan = _plan(half, experts=size)
    assert plan.behind is not None
    assert (plan.budget_bytes, plan.behind.budget_bytes) == (77 * MIB, STORED.total // 2)


def test_no_room_is_refused_with_the_side_that_lacks_it() -> None:
    with pytest.raises(NodeTooSmall, match="on cuda:0"):
        _plan(device_mib=1000)
    with pytest.raises(NodeTooSmall, match="on n1"):
        _plan(host_mib=1000)
    with pytest.raises(BudgetTooSmall):
        _plan(BudgetRequest(num_bytes=7))
