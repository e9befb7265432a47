"""Two disks for every expert where there is room, and an honest list of those with one."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.disk_copies import DiskNode, disk_nodes, plan_disk_copies
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.topology import NodeFacts, Topology
from extraction.manifest import ExpertKey

KEYS = tuple(ExpertKey("model", layer, expert) for layer in range(2) for expert in range(4))
SIZES = dict.fromkeys(KEYS, 10)


def _keys(*numbers: int) -> frozenset[ExpertKey]:
    return frozenset(KEYS[number] for number in numbers)


def test_whole_store_on_one_machine_of_two_is_copied_once_to_the_other() -> None:
    plan = plan_disk_copies(SIZES, [DiskNode("a", frozenset(KEYS)), DiskNode("b", frozenset())])
    assert [(order.node, order.keys, order.nbytes) for order in plan.orders] == [("b", KEYS, 80)]
    assert plan.is_failover_safe


def test_one_machine_alone_is_never_failover_safe() -> None:
    plan = plan_disk_copies(SIZES, [DiskNode("a", frozenset(KEYS))])
    assert (plan.orders, plan.single, plan.absent) == ((), KEYS, ())


def test_groups_count_as_copies_and_are_not_ordered_again() -> None:
    nodes = [
        DiskNode("head", frozenset(KEYS), room_bytes=0),
        DiskNode("b", frozenset(), _keys(0, 1, 2, 3), 40),
        DiskNode("c", frozenset(), _keys(4, 5, 6, 7), 40),
    ]
    plan = plan_disk_copies(SIZES, nodes)
    assert plan.orders == () and plan.is_failover_safe


def test_what_no_room_is_left_for_is_listed() -> None:
    nodes = [DiskNode("a", frozenset(KEYS)), DiskNode("b", frozenset(), _keys(0, 1), 45)]
    plan = plan_disk_copies(SIZES, nodes)
    assert [order.keys for order in plan.orders] == [KEYS[2:4]]
    assert plan.single == KEYS[4:]


def test_expert_that_is_nowhere_is_absent_and_copied_to_nobody() -> None:
    plan = plan_disk_copies(SIZES, [DiskNode("a", _keys(0)), DiskNode("b", frozenset())])
    assert plan.absent == KEYS[1:]
    assert [order.keys for order in plan.orders] == [(KEYS[0],)]


def test_copies_use_the_machines_evenly() -> None:
    nodes = [DiskNode("head", frozenset(KEYS))] + [DiskNode(name, frozenset()) for name in "bcde"]
    plan = plan_disk_copies(SIZES, nodes)
    assert [len(order.keys) for order in plan.orders] == [2, 2, 2, 2]


NODES = st.lists(
    st.builds(
        DiskNode,
        st.uuids().map(str),
        st.frozensets(st.sampled_from(KEYS)),
        st.frozensets(st.sampled_from(KEYS), max_size=3),
        st.none() | st.integers(0, 100),
    ),
    max_size=5,
    unique_by=lambda node: node.name,
)


@given(NODES, st.dictionaries(st.sampled_from(KEYS), st.integers(1, 30)), st.integers(1, 3), st.randoms())
def test_plan_is_safe_within_room_and_deterministic(
    nodes: list[DiskNode], sizes: dict[ExpertKey, int], copies: int, chance: random.Random
) -> None:
    plan = plan_disk_copies(sizes, nodes, copies)
    ordered = {order.node: frozenset(order.keys) for order in plan.orders}
    assert all(keys for keys in ordered.values())
    for node in nodes:
        new = ordered.get(node.name, frozenset())
        assert not new & (node.held | node.group)
        taken = sum(sizes[key] for key in new)
        if node.room_bytes is not None and new:
            assert taken + sum(sizes.get(key, 0) for key in node.group - node.held) <= node.room_bytes
    for key in sizes:
        before = [node.name for node in nodes if key in node.held | node.group]
        after = len(before) + sum(key in keys for keys in ordered.values())
        assert (key in plan.absent) == (not before)
        assert (key in plan.single) == (after == 1)
        assert after <= max(copies, len(before))
        if 0 < after < copies:
            free = [
                node for node in nodes if node.name not in before and key not in ordered.get(node.name, ())
            ]
            for node in free:
                taken = sum(sizes[other] for other in ordered.get(node.name, ()))
                taken += sum(sizes.get(other, 0) for other in node.group - node.held)
                assert node.room_bytes is not None and taken + sizes[key] > node.room_bytes
    chance.shuffle(nodes)
    assert plan_disk_copies(sizes, nodes, copies) == plan


def _facts(node_id: str, *, has_store: bool = False, disk_bytes: int = 100) -> NodeFacts:
    return NodeFacts(node_id, node_id, 0, 1, 1.0, 1.0, 0.0, disk_bytes=disk_bytes, has_store=has_store)


def test_machines_of_a_plan_bring_their_groups_and_disks() -> None:
    plan = ServicePlan(
        (ExpertGroup("g0", KEYS[:4]), ExpertGroup("g1", KEYS[4:7])),
        (
            ActorPlan("x", "g0", "b"),
            ActorPlan("y", "g1", "b"),
            ActorPlan("z", "g1", None),
            ActorPlan("w", "g0", "c"),
        ),
        router_keys=KEYS[7:],
    )
    idle = _facts("d", has_store=True)
    topology = Topology(
        (_facts("head", has_store=True), _facts("b"), _facts("c", disk_bytes=7), idle), "head"
    )
    head, b, c = disk_nodes(plan, topology, {"c": _keys(1)})
    assert (head.held, head.group) == (frozenset(KEYS), frozenset())
    assert (b.held, b.group, b.room_bytes) == (frozenset(), frozenset(KEYS[:7]), 100)
    assert (c.held, c.group, c.room_bytes) == (_keys(1), frozenset(KEYS[:4]), 7)
