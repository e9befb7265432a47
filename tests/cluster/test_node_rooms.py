"""What machines of a running cluster may hold of the experts."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from cluster.demand import uniform_demand
from cluster.node_report import Arithmetic, CardReport, as_node_facts
from cluster.node_rooms import RoomRules, facts_of, make_topology
from cluster.placement import place
from cluster.topology import Gpu, NodeFacts
from experts.budget import BudgetRequest, ExpertBytes
from experts.node_memory import NodeMemory
from extraction.manifest import ExpertKey
from tests.cluster.machines import ARITHMETIC, GIB, machine, node

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


CARD = CardReport(NodeMemory(24 * GIB, 20 * GIB), Arithmetic("cuda/class", "", 900e9))
WITH_GPUS = machine(gpus=(Gpu("first", 24 * GIB), Gpu("second", 24 * GIB)))
ON_CARDS = replace(
    RULES, expert_device="auto", card_bytes=GIB, stored=ExpertBytes(40 * GIB, 1 << 19), actor_bytes=2 * GIB
)


def test_card_of_a_machine_is_its_room_and_host_memory_is_behind_it() -> None:
    facts = _facts(ON_CARDS, card=CARD, machine=WITH_GPUS)
    assert facts.room_bytes == 20 * GIB - 24 * GIB // 10 - 4 * GIB, "four actors may come"
    assert facts.behind_bytes == 40 * GIB, "all that the store has"
    assert (facts.numerics_class, facts.expert_bytes_s) == ("cuda/class", 900e9)
    assert len(facts.gpus) == 1, "one of them is used"
    asked = replace(ON_CARDS, host_requests=(BudgetRequest(num_bytes=GIB),))
    assert _facts(asked, card=CARD).behind_bytes == GIB
    one = replace(ON_CARDS, overrides={"node-7": BudgetRequest(num_bytes=3 * GIB)})
    assert _facts(one, card=CARD).room_bytes == 3 * GIB


def test_cards_are_used_where_they_are_asked_for() -> None:
    for rules, card in ((RULES, CARD), (ON_CARDS, None)):
        facts = _facts(rules, card=card)
        assert (facts.gpus, facts.behind_bytes, facts.numerics_class) == ((), 0, ARITHMETIC.numerics_class)
    only = replace(ON_CARDS, expert_device="cuda")
    assert "PyTorch sees no GPU there" in str(facts_of(node(has_store=True), only))
    assert isinstance(facts_of(HERE, only), NodeFacts), "its routers compute on the CPU"
    unsound = replace(CARD, arithmetic=Arithmetic("", "", 0.0))
    assert "other bits" in str(facts_of(node(has_store=True, card=unsound), only))


def test_host_budget_is_that_of_machines_without_a_card_where_others_have_one() -> None:
    both = replace(
        ON_CARDS,
        requests=(BudgetRequest(num_bytes=24 * GIB),),
        host_requests=(BudgetRequest(num_bytes=4 * GIB),),
    )
    assert _facts(both).room_bytes == 4 * GIB
    assert (_facts(both, card=CARD).room_bytes, _facts(both, card=CARD).behind_bytes) == (24 * GIB, 4 * GIB)
    fit = replace(both, host_requests=())
    assert _facts(fit).room_bytes == 60 * GIB - 64 * GIB // 10 - 2 * 2 * GIB
    on_cpus = replace(both, expert_device="cpu", host_requests=())
    assert _facts(on_cpus).room_bytes == 24 * GIB


def test_card_with_too_little_host_memory_behind_it_is_refused_with_the_reason() -> None:
    one = ON_CARDS.stored.largest
    least = replace(ON_CARDS, host_requests=(BudgetRequest(num_bytes=4 * one),))
    assert _facts(least, card=CARD).behind_bytes == 4 * one
    for rules in (
        replace(ON_CARDS, host_requests=(BudgetRequest(num_bytes=4 * one - 1),)),
        replace(ON_CARDS, actor_bytes=20 * GIB),
    ):
        reason = facts_of(node(has_store=True, card=CARD), rules)
        assert "host memory behind its card" in str(reason) and f"{4 * one} bytes" in str(reason)


def test_no_actor_comes_to_routers_on_a_cpu_where_all_are_to_be_on_cards() -> None:
    facts = facts_of(HERE, replace(ON_CARDS, expert_device="cuda"))
    assert isinstance(facts, NodeFacts) and not facts.is_for_actors and facts.most_actors == 0
    topology, _ = make_topology(
        [HERE, node(has_store=True, card=CARD, machine=WITH_GPUS)], replace(ON_CARDS, expert_device="cuda")
    )
    keys = tuple(ExpertKey("model", 0, number) for number in range(12))
    plan = place(topology, uniform_demand(dict.fromkeys(keys, GIB), 4, 16))
    assert {actor.num_gpus for actor in plan.actors} == {0.25}


def test_router_s_card_is_nobody_else_s() -> None:
    here = replace(HERE, card=CARD)
    facts = facts_of(here, replace(ON_CARDS, is_router_on_card=True))
    assert isinstance(facts, NodeFacts)
    assert (facts.is_for_actors, facts.gpus, facts.numerics_class) == (False, (), "cuda/class")
    facts = facts_of(here, ON_CARDS)
    assert isinstance(facts, NodeFacts) and facts.is_for_actors
    assert facts.numerics_class == ARITHMETIC.numerics_class


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
