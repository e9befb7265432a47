"""Some of the actors' answers are computed again elsewhere and compared, so that a wrong but finite one is found.

Which answers is decided by a seeded count, each with the same chance r whatever came before: an actor that is always
wrong stays unknown for n answers with probability (1 - r)^n, so for 4.6 / r of them with 1%. Of an answer every expert
is computed again, but of each only a few rows. That happens on a thread of its own with a short queue; while it is
full, answers that are due are owed, and later ones of the same actor audited in their place. An audit comes after its
answer was used: it finds out who must not be asked again, it does not mend a token. Used by `experts.remote_directory`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.shares import Place, thin

logger = logging.getLogger(__name__)

ROWS_OF_EXPERT = 4
"""Most rows of one expert that are computed again."""
QUEUE_LENGTH = 4
MOST_OWED = 1024
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}
"""Of a row's largest value, between numerics classes."""


@dataclass(frozen=True)
class Opinion:
    """The same rows as somebody computed them."""

    place: Place
    incarnation: int
    """0 for this process."""
    numerics_class: str
    rows_RD: Tensor


@dataclass(frozen=True)
class Audited:
    """An answer, or those of its rows that are computed again."""

    call: ExpertCall
    first: Opinion


AskOthers = Callable[[ExpertCall, Place], Iterator[Opinion]]
"""Gives opinions on a call one after another, none of them by the place that is named."""


def is_due(seed: int, number: int, share: float) -> bool:
    """Whether answer `number` is audited: true for `share` of all, spread like chance, the same in every run.

    Source of the mixing: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    mask = (1 << 64) - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) < share * 2.0**64


def agree(one: Opinion, other: Opinion) -> bool:
    """Bit for bit within a numerics class; between classes within TOLERANCE of the row's largest value."""
    if one.rows_RD.shape != other.rows_RD.shape:
        return False
    if one.numerics_class == other.numerics_class:
        return torch.equal(one.rows_RD.view(torch.uint8), other.rows_RD.view(torch.uint8))
    left, right = one.rows_RD.float(), other.rows_RD.float()
    limit_R1 = right.abs().amax(dim=1, keepdim=True) * TOLERANCE[one.rows_RD.dtype]
    return bool(((left - right).abs() <= limit_R1).all())


def find_wrong(opinions: Sequence[Opinion], *, is_last: bool = False) -> frozenset[Place] | None:
    """Who is wrong, of all who gave an opinion; None where that cannot be told without another one.

    Two who agree are right, and whoever differs from them is wrong. is_last: there is no other opinion to come; then
    this process is right, if it gave one.
    """
    for index, one in enumerate(opinions):
        if any(agree(one, other) for other in opinions[index + 1 :]):
            return frozenset(other.place for other in opinions if not agree(one, other))
    if is_last:
        for one in opinions:
            if one.place is None:
                return frozenset(other.place for other in opinions if other is not one)
    return None


class Auditor:
    """Chooses answers, and has them computed again on its own thread."""

    def __init__(
        self,
        share: float,
        seed: int,
        ask_others: AskOthers,
        on_wrong: Callable[[Opinion], None],
    ) -> None:
        """on_wrong: called on the auditor's thread with whoever was found to be wrong."""
        self.done = self.disagreed = self.undecided = 0
        self._share, self._seed = share, seed
        self._ask_others, self._on_wrong = ask_others, on_wrong
        self._number = 0
        self._owed: dict[Place, int] = {}
        self._counting = threading.Lock()
        self._queue: queue.Queue[Audited | None] = queue.Queue(QUEUE_LENGTH)
        self._thread = threading.Thread(target=self._run, name="expert-audit", daemon=True)
        if share:
            self._thread.start()

    @property
    def owed(self) -> int:
        """Answers that were due while the queue was full, and are not made up for yet."""
        return sum(self._owed.values())

    def offer(self, call: ExpertCall, answer: Opinion) -> None:
        """An actor's answer; maybe audits it. Does not wait. The answer must not be written to any more."""
        if not self._share:
            return
        with self._counting:
            self._number += 1
            owed = self._owed.pop(answer.place, 0) + is_due(self._seed, self._number, self._share)
            if not owed:
                return
            if not self._queue.full():
                part, rows = thin(call, ROWS_OF_EXPERT)
                rows_RD = answer.rows_RD
                if len(rows) < len(rows_RD):
                    rows_RD = rows_RD.index_select(0, torch.tensor(rows))
                opinion = Opinion(answer.place, answer.incarnation, answer.numerics_class, rows_RD)
                self._queue.put_nowait(Audited(part, opinion))
                owed -= 1
            if owed and len(self._owed) < MOST_OWED:
                self._owed[answer.place] = min(owed, MOST_OWED)

    def drain(self) -> None:
        """Wait until everything that was taken is audited."""
        self._queue.join()

    def close(self) -> None:
        """Ends the thread after what it is computing now; what waits is dropped."""
        if not self._thread.is_alive():
            return
        with self._counting:
            self._share = 0.0
            while not self._queue.empty():
                self._queue.get_nowait()
                self._queue.task_done()
            self._queue.put(None)
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while (audited := self._queue.get()) is not None:
            try:
                if self._share:  # else it is closing
                    self._audit(audited)
            except Exception:  # an audit must not end the thread; nothing of an answer hangs on it
                logger.exception("an audit of %s failed", audited.first.place)
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _audit(self, audited: Audited) -> None:
        opinions = [audited.first]
        wrong: frozenset[Place] | None = None
        for opinion in self._ask_others(audited.call, audited.first.place):
            opinions.append(opinion)
            wrong = find_wrong(opinions)
            if wrong is not None:
                break
        else:
            wrong = find_wrong(opinions, is_last=True)
        if len(opinions) == 1:
            return
        self.done += 1
        if wrong == frozenset():
            return
        self.disagreed += 1
        if wrong is None:
            self.undecided += 1
            logger.error("%s disagree, and nobody else can say who is right", _names(opinions))
            return
        for opinion in opinions:
            if opinion.place in wrong:
                self._on_wrong(opinion)


def _names(opinions: Sequence[Opinion]) -> str:
    return ", ".join(opinion.place or "this process" for opinion in opinions)
