"""Who gets a request, and who is left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routers.choice import RouterLoad, choose_router, routers_to_leave

IDLE = RouterLoad(0, 0)
LOST = RouterLoad(0, 0, lost_at_s=10.0)


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([IDLE], 0),
        ([IDLE, IDLE], 0),
        ([RouterLoad(2, 10), RouterLoad(1, 900)], 1),
        ([RouterLoad(1, 90), RouterLoad(1, 10)], 1),
        ([LOST, RouterLoad(50, 9000)], 1),
        ([RouterLoad(0, 0, lost_at_s=12.0), LOST], 1),
    ],
)
def test_least_requests_then_least_tokens_and_none_that_is_lost(loads: list[RouterLoad], chosen: int) -> None:
    assert choose_router(loads, None, ()) == chosen


def test_choices_of_one_prompt_stay_together() -> None:
    loads = [RouterLoad(1, 5), RouterLoad(9, 900, frozenset({"g"}))]
    assert choose_router(loads, "g", ()) == 1
    assert choose_router(loads, "h", ()) == 0
    assert choose_router(loads, "g", {1}) == 0


def test_full_routers_are_passed_over_and_a_lost_one_is_not_asked_in_their_place() -> None:
    assert choose_router([IDLE, RouterLoad(3, 3)], None, {0}) == 1
    assert choose_router([IDLE, RouterLoad(3, 3)], None, {0, 1}) is None
    assert choose_router([LOST, IDLE], None, {1}) is None


LOADS = st.lists(
    st.builds(
        RouterLoad,
        st.integers(0, 5),
        st.integers(0, 50),
        st.frozensets(st.sampled_from("gh")),
        st.none() | st.floats(0, 9),
        st.none() | st.floats(0, 9),
    ),
    min_size=1,
    max_size=5,
)


@given(LOADS, st.sampled_from([None, "g"]), st.frozensets(st.integers(0, 4)))
def test_choice_is_never_full_and_never_lost_while_one_lives(
    loads: list[RouterLoad], group: str | None, full: frozenset[int]
) -> None:
    chosen = choose_router(loads, group, full)
    alive = {index for index, load in enumerate(loads) if load.lost_at_s is None}
    if chosen is None:
        assert (alive or set(range(len(loads)))) <= full
    else:
        assert chosen not in full
        assert not alive or chosen in alive


def test_router_is_left_after_its_patience_where_another_is_ready() -> None:
    stuck, idle_and_stuck = RouterLoad(2, 9, unready_since_s=100.0), RouterLoad(0, 0, unready_since_s=0.0)
    assert routers_to_leave([stuck, IDLE, idle_and_stuck], 115.5, 15.0) == [0]
    assert routers_to_leave([stuck, IDLE], 115.0, 15.0) == []
    assert routers_to_leave([stuck], 999.0, 15.0) == []
    assert routers_to_leave([stuck, LOST, idle_and_stuck], 999.0, 15.0) == []
