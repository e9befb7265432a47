"""Asks one actor for one share of a call, and keeps account: deadlines, latencies, failures, rows.

What follows from a failure is decided elsewhere, in `experts.remote_directory`, which uses this.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experts.call_times import CallTimes
from experts.connection import ExpertConnection
from experts.directory import FAILURE_KINDS, FailureKind
from experts.errors import AnswerNotFinite, ExpertError, PeerLost, TransportError
from experts.links import ActorLinks
from experts.native_plane import Errand
from experts.native_products import find_finite
from experts.shares import Place, Share
from experts.suspensions import ALL_LAYERS, Suspensions


class Question(NamedTuple):
    """A share that was sent to an actor; its connection is held until `Asker.hear` or `Asker.drop`."""

    name: str
    link: ExpertConnection
    share: Share
    started_s: float


class Heard(NamedTuple):
    """A question and the rows that came, which nobody has judged yet."""

    question: Question
    rows_RD: Tensor


@dataclass(frozen=True)
class Failure:
    """A share that somebody did not compute, or not well."""

    place: Place
    share: Share
    error: ExpertError
    rows_RD: Tensor | None = None
    """What came, where the values are what is wrong."""
    incarnation: int = 0
    """Of the actor."""


Begun = Question | Heard | Failure
"""How far a share has come."""


@dataclass
class AskCounters:
    """Since the start. Guarded by the asker's lock."""

    remote_rows: int = 0
    foreign_rows: int = 0
    """Of another numerics class."""
    hop_seconds: float = 0.0


class Asker:
    """Safe for several threads."""

    def __init__(
        self, links: ActorLinks, times: CallTimes, own_class: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: monotonic, in seconds."""
        self.counters = AskCounters()
        self.failures: dict[FailureKind, int] = dict.fromkeys(FAILURE_KINDS, 0)
        self.times = times
        self.suspensions = Suspensions()
        self._links, self._own_class, self._clock = links, own_class, clock
        self._counting = threading.Lock()

    def ask(self, name: str, link: ExpertConnection, share: Share) -> Question | Failure:
        """Send a share. Raises ValueError when the call does not fit the connection, which stays good."""
        call, started_s = share.call, self._clock()
        is_sent = False
        timeout_s = self.times.begin(name, call.num_rows, len(call.experts))
        try:
            link.start(call, timeout_s=timeout_s)
            is_sent = True
        except TransportError as error:
            return self.fail(name, link, share, error)
        finally:
            if not is_sent:
                self.times.end(name, call.num_rows, None, started_s)
        return Question(name, link, share, started_s)

    def hear(
        self, question: Question, *, is_checked: bool = True, is_counted: bool = True
    ) -> Tensor | Failure:
        """Wait for the rows. is_checked: rows that are not finite are a failure, unless the activations are not.
        is_counted: among the rows, since they go into an answer."""
        name, link, share = question.name, question.link, question.share
        waiting_since_s = self._clock()
        rows_RD: Tensor | None = None
        try:
            rows_RD = link.finish()
        except TransportError as error:
            return self.fail(name, link, share, error)
        finally:
            now_s = self._clock()
            seconds = None if rows_RD is None else now_s - question.started_s
            self.times.end(name, share.call.num_rows, seconds, now_s)
            self._count(now_s - waiting_since_s)
        return self.judge(question, rows_RD, is_checked=is_checked, is_counted=is_counted)

    def judge(
        self, question: Question, rows_RD: Tensor, *, is_checked: bool = True, is_counted: bool = True
    ) -> Tensor | Failure:
        """Of rows that have come. Arguments as of `hear`."""
        name, link, share, _ = question
        if is_checked and not are_finite(rows_RD) and are_finite(share.call.tokens_TD):
            return self.fail(name, link, share, AnswerNotFinite(name), rows_RD)
        self.suspensions.clear(name, (share.call.component, share.call.layer))
        if is_counted:
            self.count_rows(link, share.call.num_rows)
        return rows_RD

    def take_over(self, name: str, link: ExpertConnection, share: Share, errand: Errand) -> Question:
        """A share that the C source has sent, and whose answer is still to be heard."""
        self.times.begin(name, share.call.num_rows, len(share.call.experts))
        self.note_waited(errand)
        link.owe(share.call.num_rows, errand.deadline_ns * 1e-9)
        return Question(name, link, share, errand.asked_ns * 1e-9)

    def note_answered(self, name: str, errands: Sequence[Errand]) -> None:
        """Shares that the C source has sent, and whose rows came."""
        answers = [(errand.num_rows, (errand.answered_ns - errand.asked_ns) * 1e-9) for errand in errands]
        self.times.note(name, answers, self._clock())
        self._count(sum(errand.waited_ns for errand in errands) * 1e-9)

    def note_waited(self, errand: Errand) -> None:
        """For an answer that the C source has waited for in vain: part of the hop all the same, as in `hear`."""
        self._count(errand.waited_ns * 1e-9)

    def count_rows(self, link: ExpertConnection, num_rows: int) -> None:
        """Rows that go into an answer."""
        self._count(0.0, num_rows, is_foreign=link.info.numerics_class != self._own_class)

    def _count(self, hop_s: float, num_rows: int = 0, *, is_foreign: bool = False) -> None:
        counters = self.counters
        with self._counting:
            counters.hop_seconds += hop_s
            counters.remote_rows += num_rows
            counters.foreign_rows += num_rows if is_foreign else 0

    def drop(self, question: Question) -> None:
        """Close the connection: an answer that nobody waits for must not be taken for the next call's."""
        question.link.close()
        self.times.end(question.name, question.share.call.num_rows, None, self._clock())

    def fail(
        self,
        name: str,
        link: ExpertConnection,
        share: Share,
        error: TransportError,
        rows_RD: Tensor | None = None,
    ) -> Failure:
        """Take note that an actor did not answer, or not well."""
        kind, now_s = _kind_of(error), self._clock()
        with self._counting:
            self.failures[kind] += 1
        if kind == "error":
            self.suspensions.note(name, (share.call.component, share.call.layer), now_s)
        elif kind == "late":  # its heartbeats come: it would be connected and asked again at once
            self.suspensions.note(name, ALL_LAYERS, now_s)
        self._links.tell_lost(name, link)
        return Failure(name, share, error, rows_RD, link.endpoint.incarnation)


def are_finite(values: Tensor) -> bool:
    """Whether no value is infinite or not a number."""
    found = find_finite(values)
    return bool(torch.isfinite(values).all()) if found is None else found


def _kind_of(error: TransportError) -> FailureKind:
    if isinstance(error, PeerLost):
        return error.kind
    return "not finite" if isinstance(error, AnswerNotFinite) else "error"
