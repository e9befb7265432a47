"""Dealing experts out to groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import plan_local, split_experts
from cluster.plan import ServicePlan
from extraction.manifest import ExpertKey


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 9))
def test_every_expert_is_in_one_group_and_layers_are_spread_evenly(
    layers: int, experts: int, groups: int
) -> None:
    keys = [ExpertKey("model", layer, expert) for layer in range(layers) for expert in range(experts)]
    placed = split_experts(keys[::-1], groups)
    assert len(placed) == groups
    assert sorted(key for group in placed for key in group) == keys
    for layer in range(layers):
        counts = [sum(key.layer == layer for key in group) for group in placed]
        assert max(counts) - min(counts) <= 1


def test_placement_depends_on_the_keys_alone() -> None:
    keys = [ExpertKey("model", layer, expert) for layer in range(3) for expert in range(8)]
    assert split_experts(keys, 3) == split_experts(list(reversed(keys)), 3)


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="0 groups"):
        split_experts([ExpertKey("model", 0, 0)], 0)


def test_local_plan_has_an_actor_for_each_group_of_the_split() -> None:
    keys = [ExpertKey("model", layer, expert) for layer in range(2) for expert in range(5)]
    plan = plan_local(keys, 2, (100, 200))
    assert [group.keys for group in plan.groups] == split_experts(keys, 2)
    assert [(actor.name, actor.group, actor.budget_bytes) for actor in plan.actors] == [
        ("experts-0", "experts-0", 100),
        ("experts-1", "experts-1", 200),
    ]
    assert not plan.router_keys


def test_local_plan_without_actors_keeps_every_expert_in_the_routers_process() -> None:
    keys = [ExpertKey("model", 0, expert) for expert in (2, 0, 1)]
    assert plan_local(keys, 0) == ServicePlan((), (), tuple(sorted(keys)))


def test_another_number_of_budgets_than_actors_is_refused() -> None:
    with pytest.raises(ValueError, match="1 budgets for 2 actors"):
        plan_local([ExpertKey("model", 0, 0)], 2, (100,))
