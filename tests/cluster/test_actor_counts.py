"""How many actors a group should have: what nobody asks for goes, what answers depend on stays."""

from __future__ import annotations

import math

import pytest

from cluster.actor_counts import (
    GroupLoad,
    GroupView,
    ScalerSettings,
    ScalerState,
    view_groups,
    wanted_counts,
)
from cluster.capacity import CapacityState

SETTINGS = ScalerSettings(max_actors=6, stall_s=0.5)


class _Group:
    """One group that is looked at again and again."""

    def __init__(self, count: int, fallback_s: float = 0.0, num_nodes: int = 2) -> None:
        self.count, self.fallback_s, self.num_nodes = count, fallback_s, num_nodes
        self.state, self.now_s = ScalerState(), 100.0

    def look(self, rows: float, busy: float = 0.1, after_s: float = 1.0) -> GroupView:
        self.now_s += after_s
        load = GroupLoad("group", rows, busy, 1000, 100, fallback_s=self.fallback_s)
        (view,) = view_groups(self.state, [load], {"group": self.count}, self.num_nodes, SETTINGS, self.now_s)
        self.state = ScalerState(self.now_s, {"group": view.history})
        return view

    def wants(
        self, rows: float, busy: float = 0.1, after_s: float = 1.0, capacity: CapacityState = "focus"
    ) -> int:
        view = self.look(rows, busy, after_s)
        return wanted_counts([view], capacity, SETTINGS, self.now_s)["group"]

    def wants_after(self, rows: float, seconds: int, busy: float = 0.1) -> int:
        return [self.wants(rows, busy) for _ in range(seconds)][-1]


def test_spare_without_work_stays_where_answers_would_wait_too_long_for_its_experts() -> None:
    assert _Group(2, fallback_s=0.4).wants_after(10.0, 70) == 1
    assert _Group(2, fallback_s=0.6).wants_after(10.0, 70) == 2


def test_second_actor_comes_for_safety_alone() -> None:
    assert _Group(1, fallback_s=0.6).wants(10.0) == 2
    assert _Group(0, fallback_s=0.6).wants(10.0) == 2
    assert _Group(1, fallback_s=0.4).wants(10.0) == 1


def test_single_node_has_no_place_for_a_spare() -> None:
    assert _Group(1, fallback_s=0.6, num_nodes=1).wants(10.0) == 1


def test_group_that_nobody_asks_for_needs_no_spare() -> None:
    group = _Group(2, fallback_s=0.6)
    assert group.wants(10.0) == 2
    assert group.wants_after(0.0, 59) == 2
    assert group.wants_after(0.0, 5) == 1


def test_group_that_no_router_could_compute_is_never_without_an_actor() -> None:
    group = _Group(1, fallback_s=math.inf)
    assert group.wants_after(0.0, 200) == 1
    assert group.wants(0.0, capacity="rest") == 1
    assert _Group(0, fallback_s=math.inf).wants(0.0, capacity="rest") == 1


def test_idle_group_that_was_drained_does_not_come_back_by_what_is_remembered_of_its_demand() -> None:
    group = _Group(1)
    group.wants_after(1000.0, 30)
    assert group.wants_after(0.0, 62) == 0
    group.count = 0
    assert group.wants_after(0.0, 120) == 0
    assert group.wants(5.0) == 1


def test_busy_group_with_a_spare_grows_beyond_it() -> None:
    group = _Group(2, fallback_s=0.6)
    assert [group.wants(10.0, busy=1.8) for _ in range(7)][-1] == 3


def test_cold_group_gives_memory_before_it_is_drained() -> None:
    group = _Group(1)
    group.look(10.0)
    views = [group.look(0.0) for _ in range(15)]
    assert [view.is_cold for view in views].index(True) == 10
    assert views[-1].is_asked
    assert not group.look(1.0).is_cold


def test_light_load_leaves_room_for_spares_and_the_ceiling_does_not() -> None:
    settings = ScalerSettings(max_actors=4)
    loads = [GroupLoad(f"g{index}", 10.0 - index, 0.1, 1000, 100, fallback_s=9.0) for index in range(3)]
    counts = {load.group: 1 for load in loads}
    views = view_groups(ScalerState(), loads, counts, 2, settings, 0.0)
    assert wanted_counts(views, "wake", settings, 0.0) == {"g0": 2, "g1": 1, "g2": 1}


@pytest.mark.parametrize("capacity", ["wake", "focus", "crisis"])
def test_short_pause_changes_nothing(capacity: CapacityState) -> None:
    group = _Group(1)
    counts = [group.wants(rows, after_s=20.0, capacity=capacity) for rows in (10.0, 0.0, 0.0, 10.0) * 10]
    assert set(counts) == {1}
