"""Feedback on answers: which recent ones there were, and what their scores change.

A score reaches the requests of an answer by id. Everything that learns from it is a sink; one sink is here, the running
reward, which is the reward signal of all later snarc requests of the service. Feedback is by answer and not by user:
keys are shared, and a name that a client sends proves nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

MAX_ANSWERS = 4096
"""Recent answers that can still be scored; the oldest are forgotten first."""
HALF_LIFE_SCORES = 16
"""After so many further scores one counts half."""


class RewardSink(Protocol):
    """Learns from feedback. Must be safe to call beside the engine's thread."""

    def reward(self, request_id: str, score: float) -> bool:
        """score: in [-1, 1]. Returns whether the request is still known here."""
        ...


class RunningReward:
    """A moving average of all scores, as a reward in [0, 1]; None before the first."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    @property
    def value(self) -> float | None:
        return 0.5 + 0.5 * self._sum / self._weight if self._weight else None

    def reward(self, request_id: str, score: float) -> bool:
        decay = 0.5 ** (1 / HALF_LIFE_SCORES)
        self._sum, self._weight = self._sum * decay + score, self._weight * decay + 1.0
        return True


class FeedbackDesk:
    """Takes scores for the answers of one router. Used on one event loop."""

    def __init__(self, sinks: Sequence[RewardSink] = ()) -> None:
        self.running = RunningReward()
        self._sinks: tuple[RewardSink, ...] = (self.running, *sinks)
        self._requests_of: OrderedDict[str, list[str]] = OrderedDict()

    def note(self, answer_id: str, request_id: str) -> None:
        """A request began that is (part of) this answer."""
        self._requests_of.setdefault(answer_id, []).append(request_id)
        self._requests_of.move_to_end(answer_id)
        if len(self._requests_of) > MAX_ANSWERS:
            self._requests_of.popitem(last=False)

    def give(self, answer_id: str, score: float) -> bool:
        """Hand a score to every sink for every request of an answer, once each. False for an unknown answer.

        The same answer may be scored again: a client may change its mind, and that is one more score.
        """
        requests = self._requests_of.get(answer_id, [])
        for request_id in requests:
            for sink in self._sinks:
                sink.reward(request_id, score)
        return bool(requests)
