"""Scores reach every request of a recent answer, and move the running reward."""

from __future__ import annotations

import pytest

from router.feedback import HALF_LIFE_SCORES, MAX_ANSWERS, FeedbackDesk, RunningReward


class _Sink:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def reward(self, request_id: str, score: float) -> bool:
        self.seen.append((request_id, score))
        return True


def test_score_reaches_every_request_of_the_answer() -> None:
    sink = _Sink()
    desk = FeedbackDesk([sink])
    for name in ("a-0", "a-1"):
        desk.note("a", name)
    desk.note("b", "b")
    assert desk.give("a", -0.5)
    assert sink.seen == [("a-0", -0.5), ("a-1", -0.5)]


def test_unknown_and_forgotten_answers_are_refused() -> None:
    desk = FeedbackDesk()
    assert not desk.give("a", 1.0)
    assert desk.running.value is None
    for number in range(MAX_ANSWERS + 1):
        desk.note(str(number), str(number))
    assert not desk.give("0", 1.0)
    assert desk.give("1", 1.0)


def test_running_reward_is_a_mean_that_forgets() -> None:
    running = RunningReward()
    running.reward("a", 1.0)
    assert running.value == 1.0
    for _ in range(HALF_LIFE_SCORES):
        running.reward("a", -1.0)
    assert running.value is not None and running.value < 0.1
    running.reward("a", 1.0)
    assert 0.0 < running.value < 1.0


def test_running_reward_of_equal_scores_is_that_score() -> None:
    running = RunningReward()
    for _ in range(100):
        running.reward("a", 0.5)
    assert running.value == pytest.approx(0.75)
