"""Deadlines and loads follow from what actors have lately taken."""

from __future__ import annotations

import pytest

from experts.call_times import (
    ENOUGH,
    EXPERT_FLOOR_S,
    FLOOR_S,
    FRESH_S,
    TIMES_P99,
    WINDOW,
    CallTimes,
    LatencySummary,
    percentile,
)
from experts.replicas import NO_LOAD_ROW_S, ActorLoad

LONGEST_S = 30.0


def _answered(times: CallTimes, name: str, num_rows: int, seconds: float, now_s: float = 0.0) -> None:
    times.begin(name, num_rows, 1)
    times.end(name, num_rows, seconds, now_s)


def test_deadline_is_the_longest_until_enough_is_known() -> None:
    times = CallTimes(LONGEST_S)
    for _ in range(ENOUGH - 1):
        _answered(times, "a", 8, 0.001)
    assert times.begin("a", 8, 8) == LONGEST_S
    times.end("a", 8, 0.001, 0.0)
    assert times.begin("a", 8, 8) == FLOOR_S + 8 * EXPERT_FLOOR_S


def test_deadline_follows_the_slowest_of_the_lately_seen() -> None:
    times = CallTimes(LONGEST_S)
    for _ in range(WINDOW):
        _answered(times, "a", 8, 0.5)
    assert times.begin("a", 8, 1) == TIMES_P99 * 0.5
    for _ in range(WINDOW):
        _answered(times, "a", 8, 5.0)
    assert times.begin("a", 8, 1) == LONGEST_S


def test_long_calls_have_deadlines_of_their_own() -> None:
    times = CallTimes(LONGEST_S)
    for _ in range(ENOUGH):
        _answered(times, "a", 8, 0.001)
    assert times.begin("a", 1000, 1) == LONGEST_S


def test_load_is_what_is_asked_and_how_long_rows_take() -> None:
    times = CallTimes(LONGEST_S)
    assert times.load("a", 0.0) == ActorLoad()
    _answered(times, "a", 100, 0.1001, now_s=5.0)
    times.begin("a", 7, 1)
    load = times.load("a", 5.0)
    assert load.outstanding_rows == 7
    assert load.row_s == pytest.approx(0.001)


def test_call_that_was_not_answered_leaves_no_load_and_no_latency() -> None:
    times = CallTimes(LONGEST_S)
    times.begin("a", 7, 1)
    times.end("a", 7, None, 0.0)
    assert times.load("a", 0.0) == ActorLoad()
    assert times.summary() == {}


def test_old_row_time_no_longer_counts_against_an_actor() -> None:
    times = CallTimes(LONGEST_S)
    _answered(times, "a", 1, 10.0, now_s=0.0)
    assert times.load("a", FRESH_S - 1).row_s > 9.0
    assert times.load("a", FRESH_S).row_s == NO_LOAD_ROW_S


def test_summary_covers_the_latest_answers_of_listed_actors() -> None:
    times = CallTimes(LONGEST_S)
    for number in range(3 * WINDOW):
        _answered(times, "a", 1, 1.0 if number < 2 * WINDOW else 2.0)
    _answered(times, "b", 1, 3.0)
    assert times.summary() == {"a": LatencySummary(WINDOW, 2.0, 2.0), "b": LatencySummary(1, 3.0, 3.0)}
    times.keep_only({"b"})
    assert times.summary().keys() == {"b"}


def test_answer_of_an_actor_that_left_meanwhile_is_ignored() -> None:
    times = CallTimes(LONGEST_S)
    times.begin("a", 1, 1)
    times.keep_only(())
    times.end("a", 1, 1.0, 0.0)
    assert times.summary() == {}


def test_percentile_is_the_smallest_value_that_enough_do_not_exceed() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.99) == 4.0
    assert percentile([1.0], 0.5) == 1.0
