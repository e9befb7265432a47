"""What a service plan refuses, and who answers for an expert."""

from __future__ import annotations

import pytest

from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.topology import NodeFacts, Topology
from extraction.manifest import ExpertKey

FIRST, SECOND, THIRD = (ExpertKey("thinker", 0, expert) for expert in range(3))
GROUPS = (ExpertGroup("experts-0", (FIRST,)), ExpertGroup("experts-1", (SECOND,)))


def test_replicas_are_owners_in_the_plans_order() -> None:
    actors = (ActorPlan("b", "experts-0"), ActorPlan("a", "experts-0"), ActorPlan("c", "experts-1"))
    plan = ServicePlan(GROUPS, actors, router_keys=(THIRD,))
    assert plan.owners() == {FIRST: ("b", "a"), SECOND: ("c",)}


def test_group_without_actor_has_no_owner() -> None:
    assert ServicePlan(GROUPS, (ActorPlan("c", "experts-1"),)).owners() == {SECOND: ("c",)}


@pytest.mark.parametrize(
    ("groups", "actors", "router_keys", "complaint"),
    [
        (GROUPS, (ActorPlan("a", "experts-0"), ActorPlan("a", "experts-1")), (), "actor names"),
        ((*GROUPS, ExpertGroup("experts-0", (THIRD,))), (), (), "group names"),
        (GROUPS, (ActorPlan("a", "experts-2"),), (), "unknown groups"),
        (GROUPS, (), (SECOND,), "more than one group"),
    ],
)
def test_inconsistent_plan_is_refused(
    groups: tuple[ExpertGroup, ...],
    actors: tuple[ActorPlan, ...],
    router_keys: tuple[ExpertKey, ...],
    complaint: str,
) -> None:
    with pytest.raises(ValueError, match=complaint):
        ServicePlan(groups, actors, router_keys)


def test_topology_refuses_a_router_on_no_node_and_a_node_twice() -> None:
    node = NodeFacts("a", "10.0.0.1", 1 << 30, 8, 1e10, 1e9, 1e-4)
    with pytest.raises(ValueError, match="none of"):
        Topology((node,), "b")
    with pytest.raises(ValueError, match="not unique"):
        Topology((node, node), "a")
    with pytest.raises(KeyError):
        Topology((node,), "a").node("b")
