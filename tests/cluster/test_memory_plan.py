"""A node's memory divided among the router and its expert actors."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import NodeBudgetTooSmall, NodeTooSmall
from cluster.memory_plan import (
    ROUTER_SHARE,
    BaseMemory,
    Node,
    choose_requests,
    divide_budget,
    plan_memory,
    unmatched,
)
from experts.budget import FIT, BudgetRequest, ExpertBytes
from experts.errors import BudgetTooSmall
from experts.node_memory import NodeMemory
from router.footprint import Footprint

EXPERTS = ExpertBytes(total=4000, largest=10)
FOOTPRINT = Footprint(
    backbone_bytes=500,
    kv_bytes=300,
    swap_bytes=200,
    buffer_bytes=100,
    actor_buffer_bytes=50,
    experts=EXPERTS,
    experts_per_token=8,
)
BASE = BaseMemory(router=1000, expert_actor=700, others=400)


def _node(available: int, total: int = 10_000) -> Node:
    return Node("n1", ("10.0.0.1", "localhost"), NodeMemory(total, available))


def test_fit_is_what_is_available_less_everything_else_and_a_tenth_of_the_node() -> None:
    plan = plan_memory([FIT], FOOTPRINT, [], _node(5000), BASE)
    assert plan.budget_bytes == 5000 - (1000 + 400) - 500 - 300 - 200 - 100 - 1000
    assert plan.router.budget_bytes == plan.budget_bytes
    assert plan.actor_budgets == ()


def test_fit_with_actors_leaves_their_processes_and_buffers() -> None:
    plan = plan_memory([FIT], FOOTPRINT, [2000, 2000], _node(8000), BASE)
    assert plan.budget_bytes == 8000 - (1000 + 400 + 2 * 700) - 500 - 300 - 200 - (100 + 2 * 50) - 1000
    assert plan.router.budget_bytes + sum(plan.actor_budgets) == plan.budget_bytes
    assert [process.process for process in plan.processes] == ["router", "experts-0", "experts-1"]


def test_fit_takes_no_more_than_is_of_use() -> None:
    assert plan_memory([FIT], FOOTPRINT, [], _node(10**9), BASE).budget_bytes == 4000
    plan = plan_memory([FIT], FOOTPRINT, [1500, 2500], _node(10**9), BASE)
    assert (plan.actor_budgets, plan.router.budget_bytes) == ((1500, 2500), 4000)


def test_fit_without_room_says_what_takes_the_memory() -> None:
    with pytest.raises(NodeTooSmall) as caught:
        plan_memory([FIT], FOOTPRINT, [], _node(3505), BASE)
    message = str(caught.value)
    assert message.startswith(
        "expert-budget: fit leaves 5 bytes on n1, below one expert (10 bytes): of 3505 available, processes 1400, "
        "backbone 500, KV cache 300, swap 200, buffers 100, 10% left 1000;"
    )


def test_stand_ins_are_the_router_s_and_no_part_of_the_budget() -> None:
    footprint = replace(FOOTPRINT, stand_in_bytes=70)
    plan = plan_memory([FIT], footprint, [2000, 2000], _node(8000), BASE)
    without = plan_memory([FIT], FOOTPRINT, [2000, 2000], _node(8000), BASE)
    assert plan.budget_bytes == without.budget_bytes - 70
    assert [process.stand_in_bytes for process in plan.processes] == [70, 0, 0]
    with pytest.raises(NodeTooSmall, match="stand-ins 70"):
        plan_memory([FIT], footprint, [], _node(3505), BASE)


def test_what_sees_and_hears_is_every_router_s_and_no_part_of_the_budget() -> None:
    footprint = replace(FOOTPRINT, media_bytes=70)
    plan = plan_memory([FIT], footprint, [2000], _node(9000), BASE, num_routers=2)
    without = plan_memory([FIT], FOOTPRINT, [2000], _node(9000), BASE, num_routers=2)
    assert plan.budget_bytes == without.budget_bytes - 140
    assert [process.media_bytes for process in plan.processes] == [70, 70, 0]
    with pytest.raises(NodeTooSmall, match="images and sound 70"):
        plan_memory([FIT], footprint, [], _node(3505), BASE)


def test_what_speaks_is_every_router_s_and_no_part_of_the_budget() -> None:
    footprint = replace(FOOTPRINT, speech_bytes=70)
    plan = plan_memory([FIT], footprint, [2000], _node(9000), BASE, num_routers=2)
    without = plan_memory([FIT], FOOTPRINT, [2000], _node(9000), BASE, num_routers=2)
    assert plan.budget_bytes == without.budget_bytes - 140
    assert [process.speech_bytes for process in plan.processes] == [70, 70, 0]
    with pytest.raises(
        NodeTooSmall, match="speech 70; lower kv-budget, lower speech-budget, leave speech out, or"
    ):
        plan_memory([FIT], footprint, [], _node(3505), BASE)


def test_named_budget_is_not_bound_by_what_seems_free() -> None:
    plan = plan_memory([BudgetRequest(share=Fraction(1, 4))], FOOTPRINT, [], _node(0), BASE)
    assert plan.budget_bytes == 1000
    with pytest.raises(BudgetTooSmall):
        plan_memory([BudgetRequest(num_bytes=9)], FOOTPRINT, [], _node(0), BASE)


def test_every_router_has_a_backbone_a_cache_and_experts_of_its_own() -> None:
    one = plan_memory([FIT], FOOTPRINT, [2000, 2000], _node(10**6), BASE)
    two = plan_memory([FIT], FOOTPRINT, [2000, 2000], _node(10**6), BASE, 2)
    assert [process.process for process in two.processes] == [
        "router-0",
        "router-1",
        "experts-0",
        "experts-1",
    ]
    assert [(r.backbone_bytes, r.kv_bytes, r.budget_bytes) for r in two.routers] == [(500, 300, 4000)] * 2
    assert two.actor_budgets == one.actor_budgets
    assert two.processes[2].buffer_bytes == 2 * one.processes[1].buffer_bytes


def test_fit_leaves_room_for_every_router() -> None:
    plan = plan_memory([FIT], FOOTPRINT, [2000], _node(9000), BASE, 3)
    engines = 3 * (1000 + 500 + 300 + 200 + 100)
    assert plan.budget_bytes == 9000 - engines - 400 - (700 + 3 * 50) - 1000


@given(budget=st.integers(0, 5000), num_routers=st.integers(1, 5), num_actors=st.integers(0, 3))
def test_routers_share_alike_and_the_parts_add_up(budget: int, num_routers: int, num_actors: int) -> None:
    groups = [500] * num_actors
    least = (num_routers + num_actors) * EXPERTS.largest
    if (groups or num_routers > 1) and budget < least:
        with pytest.raises(NodeBudgetTooSmall):
            divide_budget(budget, groups, EXPERTS, 8, "n1", num_routers)
        return
    parts = divide_budget(budget, groups, EXPERTS, 8, "n1", num_routers)
    routers = parts[:num_routers]
    assert sum(parts) == budget and len(parts) == num_routers + num_actors
    assert max(routers) - min(routers) <= 1
    assert not groups or min(parts) >= EXPERTS.largest


def test_plan_as_json_names_every_byte() -> None:
    plan = plan_memory([BudgetRequest(num_bytes=100)], FOOTPRINT, [2000, 2000], _node(8000), BASE)
    router, actor, _ = plan.as_json()["processes"]
    assert router == {
        "process": "router",
        "base_bytes": 1000,
        "backbone_bytes": 500,
        "kv_bytes": 300,
        "swap_bytes": 200,
        "buffer_bytes": 100,
        "budget_bytes": 10,
        "expert_bytes": 4000,
        "node": "n1",
        "tier": "resident",
        "stand_in_bytes": 0,
        "media_bytes": 0,
        "speech_bytes": 0,
    }
    assert (actor["base_bytes"], actor["buffer_bytes"], actor["budget_bytes"], actor["expert_bytes"]) == (
        *(700, 50),
        *(45, 2000),
    )


# Dividing


@given(
    budget=st.integers(0, 10_000),
    groups=st.lists(st.integers(0, 200).map(lambda count: count * 10), max_size=8),
)
def test_parts_add_up_and_each_holds_an_expert_and_no_more_than_its_group(
    budget: int, groups: list[int]
) -> None:
    workers = 1 + sum(nbytes > 0 for nbytes in groups)
    if groups and budget < workers * EXPERTS.largest:
        with pytest.raises(NodeBudgetTooSmall):
            divide_budget(budget, groups, EXPERTS, 8, "n1")
        return
    router, *shares = divide_budget(budget, groups, EXPERTS, 8, "n1")
    assert router + sum(shares) == budget
    if groups:
        assert router >= EXPERTS.largest
    for share, nbytes in zip(shares, groups, strict=bool(groups)):
        assert min(nbytes, EXPERTS.largest) <= share <= nbytes


def test_actors_share_by_the_bytes_of_their_groups_and_the_router_keeps_a_token_s_experts() -> None:
    router, *shares = divide_budget(1280, [1000, 3000], EXPERTS, 8, "n1")
    assert router == 80 == 8 * EXPERTS.largest
    assert shares == [300, 900]
    router, *_ = divide_budget(640, [1000, 3000], EXPERTS, 8, "n1")
    assert router == 640 // ROUTER_SHARE


def test_small_group_gets_one_expert_at_the_others_cost() -> None:
    assert divide_budget(100, [10, 2000, 2000], EXPERTS, 1, "n1") == [10, 10, 40, 40]


def test_budget_below_one_expert_for_each_process_is_refused_with_both_numbers() -> None:
    with pytest.raises(NodeBudgetTooSmall) as caught:
        divide_budget(29, [1000, 3000], EXPERTS, 8, "n1")
    assert "29 bytes on n1 are below one expert for each of 3 processes" in str(caught.value)
    assert str(caught.value).endswith("30 bytes")


# Overrides by node


@pytest.mark.parametrize("name", ["n1", "10.0.0.1", "localhost"])
def test_override_holds_for_the_node_of_that_name_or_address(name: str) -> None:
    override = BudgetRequest(num_bytes=7)
    assert choose_requests([FIT], {name: override, "n2": FIT}, _node(0)) == (override,)


def test_override_of_another_node_changes_nothing_and_is_told() -> None:
    overrides = {"n2": BudgetRequest(num_bytes=7), "n1": FIT}
    assert choose_requests([FIT], {"n2": overrides["n2"]}, _node(0)) == (FIT,)
    assert unmatched(overrides, [_node(0)]) == ["n2"]
