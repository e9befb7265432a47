"""Machines that join are asked beside everything else, those that are lost are left out, and the plan follows."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest

from cluster.link_rate import Link
from cluster.node_report import ExpertShape, NodeReport, StoreQuestion
from cluster.node_rooms import RoomRules
from cluster.node_watch import ASK_AGAIN_S, NodeWatch, PlanChange
from cluster.placement import PlacementOptions, place
from cluster.plan import ServicePlan
from cluster.service_spec import Placing
from experts.budget import BudgetRequest, ExpertBytes
from tests.cluster.clusters import EXPERT_BYTES, cluster, even_demand, node
from tests.cluster.machines import ARITHMETIC
from tests.cluster.machines import node as report
from tests.deadlines import wait_until

RULES = RoomRules(
    ExpertBytes(16 * EXPERT_BYTES, EXPERT_BYTES), 0, 0, (BudgetRequest(num_bytes=16 * EXPERT_BYTES),)
)
PLACING = Placing(
    cluster(node("a", 0, has_store=True), node("b", 8), node("c", 8)),
    even_demand(2, 8, 2),
    PlacementOptions(replicas=1),
    RULES,
    StoreQuestion("/store", "hash", ExpertShape(), ()),
)
PLAN = place(PLACING.topology, PLACING.demand, None, PLACING.options)


class _Machines:
    """Answers what nodes are; holds its answers back while it is told to."""

    def __init__(self, **reports: NodeReport) -> None:
        self.reports, self.asked = reports, 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, question: StoreQuestion, only: Collection[str]) -> Sequence[NodeReport]:
        assert question == PLACING.question
        self.asked += 1
        assert self.may_answer.wait(30.0)
        return [self.reports[node_id] for node_id in only if node_id in self.reports]


def _report(name: str, **differs: object) -> NodeReport:
    return report(**{"node_id": name, "has_store": True} | differs)


def _look(watch: NodeWatch, *alive: str, plan: ServicePlan = PLAN, now_s: float = 0.0) -> PlanChange | None:
    watch.find(alive, now_s)
    return watch.look(alive, plan, now_s)


def _change(watch: NodeWatch, *alive: str, plan: ServicePlan = PLAN) -> PlanChange:
    found: list[PlanChange] = []

    def is_there() -> bool:
        change = _look(watch, *alive, plan=plan)
        found.extend([change] if change else [])
        return bool(found)

    wait_until(is_there)
    return found[0]


def test_nothing_follows_while_the_machines_are_those_of_the_plan() -> None:
    machines = _Machines()
    watch = NodeWatch(PLACING, PLACING.topology, machines)
    assert _look(watch, "a", "b", "c") is None
    assert machines.asked == 0


def test_lost_machine_is_left_out_at_once_and_once() -> None:
    watch = NodeWatch(PLACING, PLACING.topology, _Machines())
    change = _look(watch, "a", "b")
    assert change is not None and change.reason == "node c was lost"
    assert [actor.node_id for actor in change.plan.actors] == ["b", None]
    assert _look(watch, "a", "b", plan=change.plan) is None


def test_machine_that_joins_takes_what_waits_once_it_has_answered() -> None:
    machines = _Machines(d=_report("d"))
    watch = NodeWatch(PLACING, PLACING.topology, machines)
    lost = _look(watch, "a", "b")
    assert lost is not None
    machines.may_answer.clear()
    assert _look(watch, "a", "b", "d", plan=lost.plan) is None
    machines.may_answer.set()
    change = _change(watch, "a", "b", "d", plan=lost.plan)
    assert change.reason == "node d joined"
    assert {actor.node_id for actor in change.plan.actors} == {"b", "d"}
    assert {each.node_id for each in change.topology.nodes} == {"a", "b", "d"}
    assert machines.asked == 1


def test_machine_that_cannot_take_part_is_told_once_and_asked_again_later() -> None:
    machines = _Machines(d=_report("d", has_store=False))
    watch = NodeWatch(PLACING, PLACING.topology, machines)
    refusals: dict[str, str] = {}

    def is_refused() -> bool:
        assert _look(watch, "a", "b", "c", "d") is None
        refusals.update(watch.take_refusals())
        return bool(refusals)

    wait_until(is_refused)
    assert "it does not have the store" in refusals["d"]
    assert _look(watch, "a", "b", "c", "d", now_s=ASK_AGAIN_S / 2) is None
    assert machines.asked == 1
    machines.reports["d"] = _report("d")
    assert _look(watch, "a", "b", "c", "d", now_s=ASK_AGAIN_S) is None
    assert _change(watch, "a", "b", "c", "d").reason == "node d joined"


def test_machine_that_leaves_before_it_answered_is_forgotten() -> None:
    watch = NodeWatch(PLACING, PLACING.topology, _Machines())
    told: dict[str, str] = {}

    def is_told() -> bool:
        _look(watch, "a", "b", "c", "d")
        told.update(watch.take_refusals())
        return bool(told)

    wait_until(is_told)
    assert told == {"d": "it left before it answered"}


def test_machines_are_followed_also_where_the_routers_own_is_not_trusted_any_more() -> None:
    watch = NodeWatch(PLACING, PLACING.topology, _Machines())
    assert _look(watch, "b", "c") is None
    change = _look(watch, "b")
    assert change is not None and change.reason == "node c was lost"
    assert (change.topology.router_node, change.topology.node("a").room_bytes) == ("a", 0)
    assert _look(watch, "b", plan=change.plan) is None


def test_rooms_are_those_of_machines_that_live_less_what_the_routers_have() -> None:
    watch = NodeWatch(PLACING, PLACING.topology, _Machines())
    room = PLACING.topology.node("b").room_bytes
    assert watch.rooms(("a", "b", "z"), PLAN) == {"a": 0, "b": room}


def test_machine_that_joins_takes_its_part_of_what_the_others_have() -> None:
    options = PlacementOptions(replicas=1, message_s=0.0)
    topology = cluster(node("a", 0, has_store=True), node("b", 16))
    placing = replace(PLACING, topology=topology, options=options)
    plan = place(topology, placing.demand, None, options)
    joins = _report("d", link=Link(1e9, 1e-7), arithmetic=replace(ARITHMETIC, expert_bytes_s=1e9))
    watch = NodeWatch(placing, topology, _Machines(d=joins))
    change = _change(watch, "a", "b", "d", plan=plan)
    assert {actor.node_id for actor in change.plan.actors} == {"b", "d"}
    kept = next(group for group in change.plan.groups if group.name == plan.groups[0].name)
    assert set(kept.keys) < set(plan.groups[0].keys)


@pytest.mark.parametrize(("is_scaled", "num_waiting"), [(True, 0), (False, 1)])
def test_group_that_the_load_has_left_without_an_actor_gets_none_when_its_machine_is_lost(
    is_scaled: bool, num_waiting: int
) -> None:
    watch = NodeWatch(PLACING, PLACING.topology, _Machines(), is_scaled=is_scaled)
    idle = replace(PLAN, actors=tuple(actor for actor in PLAN.actors if actor.node_id != "c"))
    change = _look(watch, "a", "b", plan=idle)
    assert change is not None
    assert len(change.plan.actors) == 1 + num_waiting
    assert {group.home for group in change.plan.groups} == {"b", None}


def test_nodes_of_which_none_is_told_change_nothing() -> None:
    """Not even this machine is among them: who was asked could not answer."""
    assert _look(NodeWatch(PLACING, PLACING.topology, _Machines())) is None
