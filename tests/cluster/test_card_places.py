"""How many expert actors come to a card, whoever sends them there: no more than Ray can give shares of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cluster.autoscaler import GroupLoad, LoadSnapshot, ScalerSettings, ScalerState, carry_out, decide
from cluster.demand import uniform_demand
from cluster.placement import PlacementOptions, place, share_gpus
from cluster.plan import ServicePlan
from cluster.replanning import place_again
from cluster.scaling_room import node_load
from cluster.topology import ACTORS_ON_A_CARD, Gpu, NodeFacts, Topology
from extraction.manifest import ExpertKey

EXPERT_BYTES = 1000
HERE = NodeFacts("a", "192.0.2.1", 2 * EXPERT_BYTES, 4, 1e9, float("inf"), 0.0, has_store=True)
DEMAND = uniform_demand(
    {ExpertKey("model", layer, expert): EXPERT_BYTES for layer in range(6) for expert in range(6)}, 2, 16
)


def _card(name: str) -> NodeFacts:
    """With memory for every expert."""
    gpus = (Gpu("one", 40 * EXPERT_BYTES),)
    return NodeFacts(
        name,
        "192.0.2.2",
        40 * EXPERT_BYTES,
        4,
        9e9,
        1e9,
        1e-6,
        has_store=True,
        gpus=gpus,
        behind_bytes=8 * EXPERT_BYTES,
    )


def _cluster(num_cards: int) -> Topology:
    return Topology((HERE, *(_card(f"g{index}") for index in range(num_cards))), "a")


def _shares(plan: ServicePlan) -> Counter[str | None]:
    """Of a node's GPUs that are asked for, in as many parts as there may be actors."""
    shares: Counter[str | None] = Counter()
    for actor in plan.actors:
        shares[actor.node_id] += round(actor.num_gpus * ACTORS_ON_A_CARD)
    return shares


@pytest.fixture
def before() -> ServicePlan:
    plan = place(_cluster(6), DEMAND, None, PlacementOptions(replicas=1))
    assert len(plan.groups) == 6
    return plan


@pytest.mark.parametrize("replicas", [1, 3])
def test_card_that_is_left_takes_four_actors_and_others_wait(before: ServicePlan, replicas: int) -> None:
    after = place_again(_cluster(1), DEMAND, before, PlacementOptions(replicas=replicas))
    assert _shares(after) == {"g0": 4, None: 0}
    assert [actor.node_id for actor in after.actors].count(None) == 2
    assert {actor.group for actor in after.actors} == {group.name for group in before.groups}


def test_replicas_come_to_cards_with_a_place_left() -> None:
    plan = place(_cluster(6), DEMAND, None, PlacementOptions(replicas=6))
    shares = _shares(plan)
    assert max(shares.values()) == 4 and shares.total() == 24, "all places of six cards"


def test_number_that_follows_the_load_stays_within_the_card(before: ServicePlan) -> None:
    card = _cluster(1)
    nodes = tuple(node_load(node.node_id, node.room_bytes, node) for node in card.nodes[1:])
    loads = tuple(
        GroupLoad(group.name, 10.0, 0.3, len(group.keys) * EXPERT_BYTES, EXPERT_BYTES, 0.5)
        for group in before.groups
    )
    state, plan = ScalerState(), before
    for second in range(60):
        snapshot = LoadSnapshot("focus", loads, nodes, True)
        state, decisions = decide(state, snapshot, plan, ScalerSettings(max_actors=12), 100.0 + second)
        plan = share_gpus(card, carry_out(plan, decisions))
    assert _shares(plan)["g0"] == 4


def test_machine_that_is_not_for_actors_has_no_place_for_one() -> None:
    assert node_load("a", 9000, replace(HERE, is_for_actors=False)).most_actors == 0
    assert (node_load("a", 9000, HERE).most_actors, node_load("a", 9000, None).most_actors) == (None, None)
