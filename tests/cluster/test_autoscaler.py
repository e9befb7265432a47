"""Decisions of the autoscaler: demand first, then trust; nothing swings; no node is filled beyond its room."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.autoscaler import (
    Decision,
    GroupLoad,
    LoadSnapshot,
    ScalerSettings,
    ScalerState,
    carry_out,
    decide,
)
from cluster.capacity import STATES, CapacityState
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.replicas import LEAST_SHARE
from cluster.scaling_room import NodeLoad
from extraction.manifest import ExpertKey

GROUP_BYTES, EXPERT_BYTES = 1000, 100
SETTINGS = ScalerSettings(max_actors=6, rise_after_s=5.0, fall_after_s=60.0, cool_down_s=30.0)
NODES = (NodeLoad("big", 3000), NodeLoad("small", 1500))


def _plan(*actors: ActorPlan, groups: int = 2) -> ServicePlan:
    made = tuple(
        ExpertGroup(f"experts-{index}", (ExpertKey("thinker", 0, index),)) for index in range(groups)
    )
    return ServicePlan(made, actors)


def _actor(group: int, node: str | None = "big", budget: int | None = None, name: str = "") -> ActorPlan:
    return ActorPlan(name or f"experts-{group}", f"experts-{group}", node, budget)


def _load(group: int, rows: float = 10.0, busy: float = 0.3, trust: float = 0.5) -> GroupLoad:
    return GroupLoad(f"experts-{group}", rows, busy, GROUP_BYTES, EXPERT_BYTES, trust)


class _Service:
    """A plan that follows the decisions, and a clock."""

    def __init__(self, plan: ServicePlan, settings: ScalerSettings = SETTINGS) -> None:
        self.plan, self.settings = plan, settings
        self.state, self.now_s = ScalerState(), 100.0
        self.waiting: set[str] = set()
        """Actors of which it is told that they wait for a machine."""

    def look(
        self,
        *loads: GroupLoad,
        capacity: CapacityState = "focus",
        nodes: Sequence[NodeLoad] = NODES,
        after_s: float = 1.0,
        can_add_machines: bool = True,
    ) -> list[Decision]:
        self.now_s += after_s
        waiting = frozenset(actor.name for actor in self.plan.actors if actor.name in self.waiting)
        snapshot = LoadSnapshot(capacity, loads, tuple(nodes), can_add_machines, waiting)
        self.state, decisions = decide(self.state, snapshot, self.plan, self.settings, self.now_s)
        self.plan = carry_out(self.plan, decisions)
        return list(decisions)

    def kinds(self, *loads: GroupLoad, capacity: CapacityState = "focus", after_s: float = 1.0) -> list[str]:
        return [decision.kind for decision in self.look(*loads, capacity=capacity, after_s=after_s)]


def test_usual_load_changes_nothing() -> None:
    service = _Service(_plan(_actor(0), _actor(1)))
    assert [service.look(_load(0), _load(1), after_s=10.0) for _ in range(30)] == [[]] * 30


def test_group_that_stays_busy_gets_a_replica_on_another_node() -> None:
    service = _Service(_plan(_actor(0), _actor(1)))
    assert service.look(_load(0, busy=0.9), _load(1)) == []
    assert service.look(_load(0, busy=0.9), _load(1)) == []
    (decision,) = service.look(_load(0, busy=0.9), _load(1), after_s=5.0)
    assert (decision.kind, decision.group, decision.node_id) == ("replicate", "experts-0", "small")
    assert "0.90 s a second" in decision.reason
    assert len(service.plan.owners()[ExpertKey("thinker", 0, 0)]) == 2


def test_short_peak_brings_no_replica() -> None:
    service = _Service(_plan(_actor(0), _actor(1)))
    for busy in (0.9, 0.1) * 20:
        assert service.look(_load(0, busy=busy), _load(1), after_s=4.0) == []


def test_changed_group_is_left_alone_for_a_while() -> None:
    service = _Service(_plan(_actor(0), _actor(1)))
    kinds = [service.kinds(_load(0, busy=2.5), _load(1)) for _ in range(30)]
    assert sum(map(len, kinds)) == 1


def test_replica_goes_when_one_would_do_for_long() -> None:
    service = _Service(_plan(_actor(0), _actor(0, "small", name="replica"), _actor(1)))
    looks = [service.look(_load(0, busy=0.1), _load(1)) for _ in range(62)]
    (decision,) = [decision for look in looks for decision in look]
    assert decision.kind == "drain" and len(service.plan.actors) == 2
    assert "fewer would do for 60 s" in decision.reason


def test_idle_service_goes_to_zero_and_comes_back_where_it_is_asked_for() -> None:
    service = _Service(_plan(_actor(0), _actor(1)))
    assert service.kinds(_load(0, 0.0, 0.0), _load(1, 0.0, 0.0), capacity="rest") == ["drain", "drain"]
    assert not service.plan.actors
    assert service.kinds(_load(0, 0.0, 0.0), _load(1, 0.0, 0.0), capacity="rest") == []
    assert service.kinds(_load(0), _load(1), capacity="wake") == ["spawn", "spawn"]
    assert {actor.group for actor in service.plan.actors} == {"experts-0", "experts-1"}


def test_floor_keeps_the_group_that_is_asked_for_most() -> None:
    service = _Service(_plan(_actor(0), _actor(1)), replace(SETTINGS, min_actors=1))
    service.look(_load(0, 5.0), _load(1, 9.0))
    assert service.kinds(_load(0, 0.0, 0.0), _load(1, 0.0, 0.0), capacity="rest") == ["drain"]
    assert [actor.group for actor in service.plan.actors] == ["experts-1"]


def test_trust_decides_between_groups_that_are_asked_for_equally() -> None:
    settings = ScalerSettings(max_actors=1)
    for trusts, winner in (((0.9, 0.1), "experts-0"), ((0.1, 0.9), "experts-1")):
        service = _Service(_plan(), settings)
        loads = [_load(group, trust=trust) for group, trust in enumerate(trusts)]
        (decision,) = service.look(*loads)
        assert (decision.kind, decision.group) == ("spawn", winner)


def test_demand_goes_before_trust() -> None:
    service = _Service(_plan(), ScalerSettings(max_actors=1))
    (decision,) = service.look(_load(0, rows=11.0, trust=0.0), _load(1, rows=10.0, trust=1.0))
    assert decision.group == "experts-0"


def test_leaving_node_is_emptied_at_once_and_its_actors_come_up_elsewhere() -> None:
    service = _Service(_plan(_actor(0, "small"), _actor(1, "big")))
    service.look(_load(0), _load(1))
    nodes = (NODES[0], replace(NODES[1], is_leaving=True))
    (decision,) = service.look(_load(0), _load(1), nodes=nodes)
    assert (decision.kind, decision.actor, decision.node_id) == ("move", "experts-0", "big")
    assert decision.successor in {actor.name for actor in service.plan.actors}
    assert {actor.node_id for actor in service.plan.actors} == {"big"}


def test_replica_on_a_lost_node_comes_up_on_another() -> None:
    service = _Service(_plan(_actor(0, "big"), _actor(0, "gone", name="replica"), _actor(1)))
    (decision,) = service.look(_load(0), _load(1))
    assert (decision.kind, decision.actor, decision.node_id) == ("move", "replica", "small")


@pytest.mark.parametrize("can_add_machines", [True, False])
def test_replica_on_a_lost_node_is_not_moved_to_a_node_with_little_room(can_add_machines: bool) -> None:
    service = _Service(_plan(_actor(0, "big"), _actor(0, "gone", name="replica"), groups=1))
    little = (NodeLoad("big", 3000), NodeLoad("small", GROUP_BYTES // LEAST_SHARE - 1))
    (decision,) = service.look(_load(0), nodes=little, can_add_machines=can_add_machines)
    if can_add_machines:
        assert (decision.kind, decision.actor, decision.node_id) == ("move", "replica", None)
        assert decision.budget_bytes == GROUP_BYTES, "for which Ray is asked"
    else:
        assert (decision.kind, decision.actor) == ("drain", "replica")


def test_only_actor_of_a_lost_node_is_moved_also_to_a_node_with_little_room() -> None:
    service = _Service(_plan(_actor(0, "gone"), groups=1))
    (decision,) = service.look(_load(0), nodes=(NodeLoad("small", EXPERT_BYTES),))
    assert (decision.kind, decision.node_id, decision.budget_bytes) == ("move", "small", EXPERT_BYTES)


def test_actor_on_a_lost_node_that_is_not_wanted_any_more_is_drained_first() -> None:
    service = _Service(_plan(_actor(0, "big"), _actor(0, "gone", name="replica"), _actor(1)))
    decisions = service.look(_load(0, 0.0, 0.0), _load(1, 0.0, 0.0), capacity="rest")
    assert [decision.kind for decision in decisions] == ["drain"] * 3


def test_spawn_without_room_shrinks_idle_groups_to_the_disk_tier() -> None:
    service = _Service(_plan(_actor(0, "big"), groups=2))
    nodes = (NodeLoad("big", 1000),)
    shrink, spawn = service.look(_load(0, 0.0, 0.0), _load(1), nodes=nodes)
    assert (shrink.kind, shrink.actor, shrink.budget_bytes) == ("shrink", "experts-0", EXPERT_BYTES)
    assert (spawn.kind, spawn.node_id, spawn.budget_bytes) == ("spawn", "big", GROUP_BYTES - EXPERT_BYTES)


def test_shrunken_group_grows_when_it_is_asked_for_and_there_is_room() -> None:
    service = _Service(_plan(_actor(0, "big", budget=200)))
    (decision,) = service.look(_load(0), _load(1, 0.0, 0.0))
    assert (decision.kind, decision.budget_bytes) == ("grow", GROUP_BYTES)
    assert service.look(_load(0), _load(1, 0.0, 0.0)) == []


def test_actor_that_fits_nowhere_waits_for_a_machine() -> None:
    service = _Service(_plan())
    nodes = (NodeLoad("tiny", EXPERT_BYTES - 1),)
    (decision,) = service.look(_load(0), _load(1, 0.0, 0.0), nodes=nodes)
    assert (decision.kind, decision.node_id, decision.budget_bytes) == ("spawn", None, GROUP_BYTES)
    assert service.look(_load(0), _load(1, 0.0, 0.0), nodes=nodes) == []


def test_actor_that_waits_gets_the_room_of_a_group_that_went_cold() -> None:
    service = _Service(_plan(_actor(0), _actor(1, None, GROUP_BYTES)))
    nodes = (NodeLoad("big", GROUP_BYTES),)
    service.waiting = {"experts-1"}
    waiting = [decision for _ in range(5) for decision in service.look(_load(0), _load(1), nodes=nodes)]
    assert waiting == [], "what is asked for keeps its memory while a machine can come"
    decisions: list[Decision] = []
    for _ in range(20):
        decisions += service.look(_load(0, 0.0, 0.0), _load(1), nodes=nodes)
    assert [(decision.kind, decision.group) for decision in decisions] == [
        ("shrink", "experts-0"),
        ("move", "experts-1"),
    ]
    (settled,) = [actor for actor in service.plan.actors if actor.group == "experts-1"]
    assert (settled.node_id, settled.budget_bytes) == ("big", GROUP_BYTES - EXPERT_BYTES)


def test_actor_whose_machine_ray_chooses_is_not_taken_for_one_that_waits() -> None:
    """It may be starting just now."""
    service = _Service(_plan(_actor(0), _actor(1, None, GROUP_BYTES)))
    assert [service.look(_load(0), _load(1)) for _ in range(20)] == [[]] * 20


def test_light_load_brings_no_replica_and_takes_none_that_is_used() -> None:
    service = _Service(_plan(_actor(0), _actor(0, "small", name="replica"), _actor(1)), ScalerSettings(4))
    for _ in range(20):
        assert service.look(_load(0, busy=0.8), _load(1, busy=0.9), capacity="wake", after_s=10.0) == []
    assert service.kinds(_load(0, busy=0.8), _load(1, busy=0.9)) == ["replicate"]


@pytest.mark.parametrize("fields", [{"max_actors": 1, "min_actors": 2}, {"max_actors": 1, "low_busy": 0.7}])
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is not in 0 to"):
        ScalerSettings(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_keep_every_promise(seed: int) -> None:
    random_of = random.Random(seed)
    groups = random_of.randint(1, 5)
    settings = ScalerSettings(
        max_actors=random_of.randint(groups, 2 * groups), min_actors=random_of.randint(0, 1)
    )
    service = _Service(_plan(groups=groups), settings)
    nodes = [
        NodeLoad(
            f"n{index}", random_of.randint(50, 4000), disk_bytes=random_of.choice((None, None, 0, 1500, 9000))
        )
        for index in range(random_of.randint(1, 4))
    ]
    homes = [random_of.choice(("n0", "n1", "n9", None)) for _ in range(groups)]
    made = zip(service.plan.groups, homes, strict=True)
    service.plan = replace(service.plan, groups=tuple(replace(group, home=home) for group, home in made))
    can_add_machines = random_of.random() < 0.5
    seen: set[str] = set()
    for _ in range(60):
        nodes = [replace(node, is_leaving=random_of.random() < 0.05) for node in nodes]
        loads = [
            replace(
                _load(
                    group, random_of.choice((0.0, 1.0, 50.0)), random_of.uniform(0.0, 2.0), random_of.random()
                ),
                fallback_s=random_of.choice((0.0, 2.0, float("inf"))),
            )
            for group in range(groups)
        ]
        capacity = random_of.choice(STATES)
        before = {actor.name for actor in service.plan.actors}
        after_s = random_of.uniform(0.5, 40.0)
        decisions = service.look(
            *loads, capacity=capacity, nodes=nodes, after_s=after_s, can_add_machines=can_add_machines
        )
        shrunk = {decision.actor for decision in decisions if decision.kind == "shrink"}
        staying = {node.node_id for node in nodes if not node.is_leaving}
        actors = service.plan.actors
        assert len(actors) <= settings.max_actors
        assert can_add_machines or all(actor.node_id is not None for actor in actors)
        new = {actor.name for actor in actors} - before
        seen |= new
        for node in nodes:
            held = [actor for actor in actors if actor.node_id == node.node_id]
            assert not (node.is_leaving and any(actor.name in new for actor in held))
            assert sum(actor.budget_bytes or GROUP_BYTES for actor in held) <= node.room_bytes
            assert len({actor.group for actor in held}) == len(held), "replicas are on different nodes"
            assert node.most_bytes is None or len(held) * GROUP_BYTES <= node.most_bytes
            assert node.can_read or all(actor.budget_bytes == GROUP_BYTES for actor in held)
        for actor in actors:
            others = {a.node_id for a in actors if a.group == actor.group and a.name in before}
            if actor.name in new - shrunk and actor.node_id is not None and others & staying:
                assert (actor.budget_bytes or GROUP_BYTES) >= GROUP_BYTES // LEAST_SHARE
    assert len(seen) <= groups * (settings.max_actors + 1), "names, and labels of metrics, are few"


def _at(home: str, *actors: ActorPlan, groups: int = 1) -> ServicePlan:
    plan = _plan(*actors, groups=groups)
    return replace(plan, groups=tuple(replace(group, home=home) for group in plan.groups))


def test_group_comes_back_on_the_machine_that_it_was_made_for() -> None:
    (decision,) = _Service(_at("small")).look(_load(0))
    assert (decision.kind, decision.node_id) == ("spawn", "small")


def test_group_whose_machine_holds_less_of_it_than_another_comes_back_there() -> None:
    nodes = (NodeLoad("big", 3000), NodeLoad("small", 400))
    (decision,) = _Service(_at("small")).look(_load(0), nodes=nodes)
    assert (decision.node_id, decision.budget_bytes) == ("big", GROUP_BYTES)


def test_replica_of_a_group_at_home_goes_to_another_machine() -> None:
    service = _Service(_at("big", _actor(0)))
    service.look(_load(0, busy=0.9))
    (decision,) = service.look(_load(0, busy=0.9), after_s=5.0)
    assert (decision.kind, decision.node_id) == ("replicate", "small")


def test_machine_without_disk_for_a_group_gets_no_actor_of_it() -> None:
    nodes = (NodeLoad("big", 3000, disk_bytes=0), NodeLoad("small", 1500))
    service = _Service(_plan(_actor(0, "big"), _actor(1, "big"), groups=4))
    loads = [_load(group) for group in range(4)]
    assert [d.node_id for d in service.look(*loads, nodes=nodes)] == ["small", "big"]
    full = (NodeLoad("big", 1500, disk_bytes=1900), NodeLoad("small", 50))
    (decision,) = _Service(_plan(_actor(0, "big"))).look(_load(0), _load(1), nodes=full)
    assert (decision.kind, decision.node_id) == ("spawn", None), (
        "one group and a half are too much for its disk"
    )


def test_actor_on_a_machine_without_a_disk_keeps_its_group_in_memory() -> None:
    nodes = (NodeLoad("big", 1000, disk_bytes=0),)
    (decision,) = _Service(_plan(_actor(0))).look(_load(0, 0.0, 0.0), _load(1), nodes=nodes)
    assert (decision.kind, decision.node_id) == ("spawn", None)


def test_group_never_gets_more_actors_than_its_most() -> None:
    settings = replace(SETTINGS, max_replicas=1)
    service = _Service(_plan(_actor(0), _actor(1)), settings)
    for _ in range(20):
        assert service.look(_load(0, busy=0.9), _load(1), after_s=5.0) == []
    with pytest.raises(ValueError, match="leaves no actor"):
        replace(SETTINGS, max_replicas=0)


SLOW_DISK_S = 3.0


def _waiting(group: int, rows: float = 10.0, busy: float = 0.1) -> GroupLoad:
    """A group that a router computes slowly from its own disk."""
    return replace(_load(group, rows, busy), fallback_s=SLOW_DISK_S)


def test_only_second_copy_outlives_an_idle_minute_and_says_why_it_came() -> None:
    service = _Service(_plan(_actor(0), groups=1))
    (decision,) = service.look(_waiting(0))
    assert (decision.kind, decision.node_id) == ("replicate", "small")
    assert "were its only actor lost, answers would wait 3.0 s" in decision.reason
    assert [service.look(_waiting(0), after_s=5.0) for _ in range(40)] == [[]] * 40
    assert len(service.plan.actors) == 2


def test_spare_takes_what_room_is_left_and_asks_for_no_machine() -> None:
    nodes = (NodeLoad("big", 3000), NodeLoad("small", 250))
    service = _Service(_plan(_actor(0), groups=1))
    (decision,) = service.look(_waiting(0), nodes=nodes)
    assert (decision.node_id, decision.budget_bytes) == ("small", 250)
    full = (NodeLoad("big", 3000), NodeLoad("small", EXPERT_BYTES - 1))
    service = _Service(_plan(_actor(0), groups=1))
    assert service.look(_waiting(0), nodes=full) == []


def test_spare_shrinks_to_the_disk_tier_for_a_group_that_has_no_actor() -> None:
    nodes = (NodeLoad("big", 1000), NodeLoad("small", 1000))
    spare = _actor(0, "small", 900, name="spare")
    service = _Service(_plan(_actor(0, "big"), spare))
    shrink, spawn = service.look(_waiting(0), _load(1), nodes=nodes)
    assert (shrink.kind, shrink.actor, shrink.budget_bytes) == ("shrink", "spare", EXPERT_BYTES)
    assert "it is a spare" in shrink.reason
    assert (spawn.kind, spawn.node_id, spawn.budget_bytes) == ("spawn", "small", GROUP_BYTES - EXPERT_BYTES)


def test_spare_of_a_node_that_leaves_goes_where_there_is_room_or_nowhere() -> None:
    nodes = [NodeLoad("big", 3000), NodeLoad("small", 1500, is_leaving=True), NodeLoad("third", 2000)]
    service = _Service(_plan(_actor(0), _actor(0, "small", name="spare"), groups=1))
    (moved,) = service.look(_waiting(0), nodes=nodes)
    assert (moved.kind, moved.actor, moved.node_id) == ("move", "spare", "third")
    nodes[2] = NodeLoad("third", EXPERT_BYTES - 1)
    service = _Service(_plan(_actor(0), _actor(0, "small", name="spare"), groups=1))
    (drained,) = service.look(_waiting(0), nodes=nodes)
    assert (drained.kind, drained.actor) == ("drain", "spare")


def test_group_that_went_cold_shrinks_long_before_it_is_drained() -> None:
    nodes = (NodeLoad("big", 1000),)
    service = _Service(_plan(_actor(0), groups=2))
    service.look(_load(0), _load(1, 0.0, 0.0), nodes=nodes)
    for _ in range(11):
        assert service.look(_load(0, 0.0, 0.0), _load(1, 0.0, 0.0), nodes=nodes) == []
    shrink, spawn = service.look(_load(0, 0.0, 0.0), _load(1), nodes=nodes)
    assert (shrink.kind, shrink.actor) == ("shrink", "experts-0")
    assert (spawn.kind, spawn.group, spawn.node_id) == ("spawn", "experts-1", "big")


def test_groups_that_come_back_together_share_the_room_evenly() -> None:
    nodes = (NodeLoad("big", 1000),)
    service = _Service(_plan(groups=2))
    decisions = service.look(_load(0), _load(1), nodes=nodes, can_add_machines=False)
    assert [(d.kind, d.budget_bytes) for d in decisions] == [("spawn", 500), ("spawn", 500)]


def test_group_that_comes_later_gets_its_even_share_of_one_that_has_all_the_room() -> None:
    nodes = (NodeLoad("big", 1000),)
    service = _Service(_plan(_actor(0), groups=2))
    assert service.look(_load(0), _load(1, 0.0, 0.0), nodes=nodes, can_add_machines=False) == []
    shrink, spawn = service.look(_load(0), _load(1), nodes=nodes, can_add_machines=False)
    assert (shrink.kind, shrink.actor, shrink.budget_bytes) == ("shrink", "experts-0", 500)
    assert "it has more than an even share" in shrink.reason
    assert (spawn.kind, spawn.budget_bytes) == ("spawn", 500)


def test_single_machine_takes_no_actor_beyond_its_room() -> None:
    nodes = (NodeLoad("only", 2000),)
    service = _Service(_plan(_actor(0, "only"), _actor(1, "only")))
    for _ in range(20):
        assert service.look(_load(0, busy=0.9), _load(1), nodes=nodes, can_add_machines=False) == []
    tiny = (NodeLoad("only", EXPERT_BYTES - 1),)
    assert _Service(_plan()).look(_load(0), _load(1), nodes=tiny, can_add_machines=False) == []


def test_what_would_not_do_is_not_taken_from_a_spare_and_given_back() -> None:
    """A quarter of the busy group finds no room beside the spare, however small the spare is made."""
    service = _Service(_plan(_actor(0, "big"), _actor(1, "big"), _actor(1, "small", 300, "spare")))
    nodes = (NodeLoad("big", 2000), NodeLoad("small", 300))
    loads = (_load(0, busy=2.5), replace(_load(1), fallback_s=10.0))
    looks = [service.look(*loads, nodes=nodes, can_add_machines=False, after_s=2.0) for _ in range(12)]
    assert not any(decision.kind in ("shrink", "grow") for look in looks for decision in look)
