"""What machines of a running cluster may hold of the experts."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from cluster.node_report import Arithmetic, as_node_facts
from cluster.node_rooms import RoomRules, facts_of, make_topology
from cluster.topology import NodeFacts
from experts.budget import BudgetRequest, ExpertBytes
from tests.cluster.machines import GIB, machine, node

RULES = RoomRules(ExpertBytes(100 * GIB, 1 << 20), GIB, 7 * GIB)
HERE = node("192.0.2.1", is_here=True, link=None, has_store=True)


def _facts(rules: RoomRules = RULES, **differs: Any) -> NodeFacts:
    facts = facts_of(node(**{"has_store": True} | differs), rules)
    assert isinstance(facts, NodeFacts), facts
    return facts


def test_report_becomes_what_planning_needs() -> None:
    facts = as_node_facts(node(has_store=True, labels={"disk": "nvme"}), 5, 3)
    assert (facts.room_bytes, facts.disk_bytes) == (5, 3)
    assert (facts.address, facts.num_cores, facts.expert_bytes_s) == ("192.0.2.7", 16, 20e9)
    assert (facts.bandwidth_bytes_s, facts.round_trip_s) == (1.1e9, 80e-6)
    assert facts.has_store and facts.labels == {"disk": "nvme"}


def test_fit_leaves_a_tenth_and_two_idle_actors() -> None:
    assert _facts().room_bytes == 60 * GIB - 64 * GIB // 10 - 2 * GIB


def test_no_machine_gets_room_for_more_than_all_experts() -> None:
    assert _facts(replace(RULES, experts=ExpertBytes(GIB, 10))).room_bytes == GIB


@pytest.mark.parametrize("name", ["node-7", "192.0.2.7"])
def test_budget_of_a_machine_goes_before_that_of_all(name: str) -> None:
    budgets = replace(
        RULES,
        requests=(BudgetRequest(num_bytes=5 * GIB),),
        overrides={name: BudgetRequest(share=Fraction(1, 4)), "other": BudgetRequest(num_bytes=1)},
    )
    assert _facts(budgets).room_bytes == 25 * GIB
    assert _facts(budgets, address="192.0.2.9", machine=machine(name="else")).room_bytes == 5 * GIB


def test_machine_without_memory_for_one_expert_holds_none() -> None:
    assert _facts(replace(RULES, actor_bytes=40 * GIB)).room_bytes == 0


def test_disk_counts_where_records_may_be_fetched_and_as_far_as_the_limit() -> None:
    fetching = replace(RULES, has_cache=True)
    assert _facts(fetching, has_store=False).disk_bytes == 500 * GIB
    assert _facts(replace(fetching, cache_limit_bytes=GIB), has_store=False).disk_bytes == GIB
    assert _facts(fetching, has_store=True).disk_bytes == 0
    unwritable = machine(is_cache_writable=False)
    assert _facts(fetching, has_store=False, machine=unwritable).disk_bytes == 0


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ({"machine": None, "arithmetic": None, "problem": "it hangs"}, "tells nothing: it hangs"),
        ({"link": None, "link_problem": "refused"}, "is not reached: refused"),
        ({"has_store": False}, "serve with --store-cache"),
        ({"arithmetic": Arithmetic("", "", 1.0)}, "other bits"),
    ],
)
def test_machine_that_cannot_take_part_is_left_out_with_the_reason(
    differs: dict[str, Any], words: str
) -> None:
    other = node(**{"has_store": True} | differs)
    topology, refused = make_topology([HERE, other], RULES)
    assert [facts.node_id for facts in topology.nodes] == [HERE.node_id]
    assert words in refused[other.node_id]


def test_machine_with_other_code_is_left_out() -> None:
    assert isinstance(facts_of(node(has_store=True), replace(RULES, code="abc")), NodeFacts)
    assert "sage-moe doctor" in str(facts_of(node(has_store=True), replace(RULES, code="abd")))


def test_router_s_machine_has_the_room_of_its_memory_plan() -> None:
    topology, refused = make_topology([node(has_store=True), HERE], RULES)
    assert topology.router_node == HERE.node_id
    assert topology.node(HERE.node_id).room_bytes == 7 * GIB
    assert topology.node(HERE.node_id).bandwidth_bytes_s == float("inf")
    assert not refused


def test_no_topology_without_this_machine() -> None:
    with pytest.raises(ValueError, match="it told nothing"):
        make_topology([node(has_store=True)], RULES)
