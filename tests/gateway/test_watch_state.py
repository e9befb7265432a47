"""Rates between answers, and what is said of a service that goes and comes."""

from __future__ import annotations

import pytest

from gateway.operations.watch_state import MAX_EVENTS, WatchState, answered, unanswered
from tests.gateway.made_up_status import made_up_status


def test_rates_are_what_the_counters_grew_by() -> None:
    state = answered(WatchState(), made_up_status(num_tokens=100), 10.0, "10:00:00Z")
    assert state.rates.generated is None
    state = answered(state, made_up_status(num_tokens=220), 12.0, "10:00:02Z")
    assert (state.rates.generated, state.rates.prompt) == (60.0, 12.0)
    assert state.rates.by_router == {"router": 60.0}


def test_counter_that_fell_gives_no_rate() -> None:
    state = answered(WatchState(), made_up_status(num_tokens=500), 10.0, "")
    state = answered(state, made_up_status(num_tokens=10, first_pid=900), 12.0, "")
    assert state.rates.generated is None and state.rates.by_router == {}


def test_service_that_goes_away_keeps_its_last_numbers_and_is_said_to_be_gone_once() -> None:
    state = answered(WatchState(), made_up_status(), 10.0, "")
    for second in range(5):
        state = unanswered(state, f"refused {second}", 12.0 + second, f"10:00:0{second}Z")
    assert state.status == made_up_status()
    assert (state.lost_since_s, state.error) == (12.0, "refused 4")
    assert state.events == ("10:00:00Z the service does not answer: refused 0",)


@pytest.mark.parametrize(
    ("first_pid", "sign"),
    [(100, "the service answers again, after 9 s"), (900, "the service was started anew, after 9 s")],
)
def test_return_says_whether_it_is_the_same_service(first_pid: int, sign: str) -> None:
    state = answered(WatchState(), made_up_status(), 10.0, "")
    state = unanswered(state, "refused", 12.0, "10:00:00Z")
    state = answered(state, made_up_status(num_tokens=5, first_pid=first_pid), 21.0, "10:00:09Z")
    assert not state.is_lost
    assert state.rates.generated is None, "nobody knows what was computed meanwhile"
    assert state.events[-1] == f"10:00:09Z {sign}"


def test_few_events_are_remembered() -> None:
    state = answered(WatchState(), made_up_status(), 0.0, "")
    for second in range(20):
        state = unanswered(state, "refused", float(second), "")
        state = answered(state, made_up_status(), second + 0.5, "")
    assert len(state.events) == MAX_EVENTS


def test_answer_that_is_no_status_is_refused() -> None:
    with pytest.raises(KeyError):
        answered(WatchState(), {"routers": [], "actors": []}, 0.0, "")
