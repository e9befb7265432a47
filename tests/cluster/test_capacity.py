"""The capacity state follows load alone: up at once, down after a while, and each state has its size."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest

from cluster.capacity import (
    FALL_AFTER_S,
    REST_AFTER_S,
    Capacity,
    CapacityState,
    Load,
    ServiceSize,
    kept_share,
    num_actors,
    observe,
    present_state,
    resident_bytes,
    resident_experts,
)
from cluster.capacity_watch import CapacityWatch

SIZE = ServiceSize(num_layers=48, num_experts=128, experts_per_token=8, expert_bytes=9, max_actors=3)
IDLE, LIGHT, USUAL, FULL = Load(0, 0, 16), Load(1, 0, 16), Load(8, 0, 16), Load(16, 4, 16)


def _states(looks: Sequence[tuple[float, Load]]) -> list[CapacityState]:
    capacity, states = Capacity(), []
    for now_s, load in looks:
        capacity = observe(capacity, load, now_s)
        states.append(capacity.state)
    return states


def test_state_rises_at_once() -> None:
    assert _states([(0, IDLE), (1, LIGHT), (2, USUAL), (3, FULL)]) == ["rest", "wake", "focus", "crisis"]
    assert _states([(0, FULL)]) == ["crisis"]


def test_one_waiting_request_is_more_than_can_be_taken() -> None:
    assert _states([(0, Load(1, 1, 16))]) == ["crisis"]


def test_state_falls_only_after_the_load_stayed_lower() -> None:
    looks = [(0.0, FULL), (1.0, LIGHT), (1.0 + FALL_AFTER_S - 0.1, LIGHT), (1.0 + FALL_AFTER_S, LIGHT)]
    assert _states(looks) == ["crisis", "crisis", "crisis", "wake"]


def test_a_burst_in_between_begins_the_wait_anew() -> None:
    looks = [(0.0, FULL), (1.0, LIGHT), (10.0, FULL), (11.0, LIGHT), (10.9 + FALL_AFTER_S, LIGHT)]
    assert _states(looks)[-1] == "crisis"


def test_rest_needs_a_longer_silence() -> None:
    looks = [(0.0, LIGHT), (1.0, IDLE), (1.0 + FALL_AFTER_S, IDLE), (1.0 + REST_AFTER_S, IDLE)]
    assert _states(looks) == ["wake", "wake", "wake", "rest"]


def test_states_stand_for_the_seed_s_experts_a_layer() -> None:
    experts = [resident_experts(state, SIZE) for state in ("rest", "wake", "focus", "crisis")]
    assert experts == [1, 4, 8, 16]
    assert resident_bytes("focus", SIZE) == 8 * 48 * 9


def test_states_never_keep_more_experts_than_there_are() -> None:
    assert resident_experts("crisis", ServiceSize(2, 8, 6, 9, 0)) == 8
    assert resident_experts("wake", ServiceSize(2, 8, 1, 9, 0)) == 1


@pytest.mark.parametrize(("state", "count"), [("rest", 0), ("wake", 2), ("focus", 3), ("crisis", 3)])
def test_states_stand_for_actors(state: CapacityState, count: int) -> None:
    assert num_actors(state, SIZE) == count


def test_state_is_shown_with_what_it_means() -> None:
    assert present_state("rest", SIZE) == "idle (REST)"
    assert present_state("wake", SIZE) == "WAKE (4 experts a layer)"


@pytest.mark.parametrize("state", ["wake", "focus", "crisis"])
def test_under_load_the_whole_budget_may_be_used(state: CapacityState) -> None:
    assert kept_share(state, SIZE) == 1


def test_at_rest_what_rest_stands_for_is_kept() -> None:
    assert kept_share("rest", SIZE) * SIZE.num_experts == resident_experts("rest", SIZE) == 1
    assert kept_share("rest", ServiceSize(0, 0, 0, 0, 0)) == 1, "a model without experts"


def test_memory_is_given_back_after_a_minute_of_silence_and_taken_again_with_the_first_request() -> None:
    told: list[Fraction] = []
    watch = CapacityWatch(SIZE, told.append)
    for now_s in (0.0, 10.0, REST_AFTER_S - 1):
        watch.look(IDLE, now_s)
    assert told == [1]
    for now_s in (REST_AFTER_S, REST_AFTER_S + 10):
        assert watch.look(IDLE, now_s) == "rest"
    assert told == [1, Fraction(1, 128)]
    assert watch.look(LIGHT, REST_AFTER_S + 11) == "wake"
    assert told == [1, Fraction(1, 128), 1]


def test_where_nobody_is_told_the_state_is_shown_all_the_same() -> None:
    watch = CapacityWatch(SIZE)
    assert [watch.look(load, now_s) for load, now_s in ((IDLE, 0.0), (IDLE, REST_AFTER_S))] == [
        "wake",
        "rest",
    ]
