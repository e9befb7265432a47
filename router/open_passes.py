"""The passes of an engine that pause: one of prompts, and maybe one of shorter ones that overtakes it.

Called by `router.engine`.
"""

from __future__ import annotations

from collections.abc import Iterator

from router.batcher import BatchLimits
from router.pace import Pace
from router.sequence import Sequence
from router.step_batch import Half
from router.step_pass import StepPass

MOST = 2


class OpenPasses:
    """In the order in which they began: each overtakes those before it."""

    def __init__(self) -> None:
        self._steps: list[StepPass] = []

    def __iter__(self) -> Iterator[StepPass]:
        return iter(self._steps)

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def next(self) -> StepPass:
        """That goes on before the others. Raises IndexError where there is none."""
        return self._steps[-1]

    def of(self, sequence: Sequence) -> StepPass | None:
        """That has some of its rows."""
        return next((step for step in self._steps if step.has(sequence)), None)

    def begin(self, step: StepPass) -> None:
        self._steps.append(step)

    def drop(self, step: StepPass) -> None:
        """Does nothing where it is not among them."""
        if step in self._steps:
            self._steps.remove(step)

    def note(self, step: StepPass, seconds: float) -> None:
        """It has gone on for so long. Does nothing where it is not among them."""
        if step in self._steps:
            step.overtaken_s = max(0.0, step.overtaken_s - seconds)
            for other in self._steps[: self._steps.index(step)]:
                other.overtaken_s += seconds

    def most_rows(self, limits: BatchLimits, pace: Pace, divisible: frozenset[Half]) -> int:
        """Rows of prompts in a new pass. divisible: halves of layers that can pause in the middle."""
        if not self._steps:
            return pace.most_rows(limits.max_batch_tokens, divisible)
        if len(self._steps) == MOST:
            return 0
        slow = self._steps[0]
        return pace.most_overtaking(slow.num_tokens, slow.forward.num_left, slow.overtaken_s)
