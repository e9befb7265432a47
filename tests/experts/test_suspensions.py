"""Actors that failed are left alone for a while, longer each time."""

from __future__ import annotations

from experts.suspensions import ALL_LAYERS, LONGEST_S, Suspensions

LAYER, OTHER = ("model", 0), ("model", 1)


def test_failure_in_one_layer_leaves_the_others() -> None:
    suspensions = Suspensions()
    suspensions.note("a", LAYER, 0.0)
    assert suspensions.of(LAYER, 0.5) == {"a"}
    assert suspensions.of(OTHER, 0.5) == frozenset()
    assert suspensions.of(LAYER, 1.0) == frozenset()


def test_late_actor_is_left_alone_in_all_layers() -> None:
    suspensions = Suspensions()
    suspensions.note("a", ALL_LAYERS, 0.0)
    assert suspensions.of(LAYER, 0.5) == suspensions.of(OTHER, 0.5) == {"a"}


def test_time_doubles_with_every_failure_up_to_a_bound() -> None:
    suspensions = Suspensions()
    now_s, waits_s = 0.0, []
    for _ in range(20):
        suspensions.note("a", LAYER, now_s)
        wait_s = 0.5
        while suspensions.of(LAYER, now_s + wait_s):
            wait_s += 0.5
        waits_s.append(wait_s)
        now_s += wait_s
    assert waits_s[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert set(waits_s[5:]) == {LONGEST_S}


def test_answer_ends_it_and_begins_from_the_start() -> None:
    suspensions = Suspensions()
    suspensions.note("a", ALL_LAYERS, 0.0)
    suspensions.note("a", LAYER, 0.0)
    suspensions.note("a", LAYER, 0.0)
    suspensions.clear("a", LAYER)
    assert suspensions.of(LAYER, 0.1) == frozenset()
    suspensions.note("a", LAYER, 0.0)
    assert suspensions.of(LAYER, 0.9) == {"a"} and suspensions.of(LAYER, 1.0) == frozenset()


def test_actor_that_left_is_forgotten() -> None:
    suspensions = Suspensions()
    suspensions.note("a", LAYER, 0.0)
    suspensions.note("b", LAYER, 0.0)
    suspensions.keep_only({"b"})
    assert suspensions.of(LAYER, 0.1) == {"b"}
