"""How long actors have lately taken, and what follows from it: how long to wait, and whom to ask. Bounded.

Called by `experts.remote_directory` with a clock of its own; safe for several threads.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from experts.replicas import MESSAGE_S, NO_LOAD_ROW_S, ActorLoad

WINDOW = 256
"""Answers of one size that are remembered."""
ENOUGH = 32
"""Answers of one size before a deadline is made from them; the tail is looked at anew after as many more."""
TIMES_P99 = 20.0
FLOOR_S = 2.0
"""A deadline is never shorter. Peers that hang altogether are found by their missing heartbeats, well before."""
EXPERT_FLOOR_S = 0.05
"""So much longer for each expert asked for, which may have to be read first: 9 MiB from a slow disk."""
FRESH_S = 10.0
"""A row's time that is older counts no more, or an actor that was slow once would never be asked again."""
SMOOTHING = 0.1
NUM_SIZES = 64


@dataclass(frozen=True)
class LatencySummary:
    """Of an actor's remembered answers, of all sizes."""

    answers: int
    p50_s: float
    p99_s: float


@dataclass
class _Recent:
    """One actor's."""

    outstanding_rows: int = 0
    row_s: float = NO_LOAD_ROW_S
    noted_at_s: float = float("-inf")
    seconds: dict[int, deque[float]] = field(default_factory=dict)
    """By size: answers of 2^(size - 1) to 2^size - 1 rows."""
    p99_s: dict[int, float] = field(default_factory=dict)
    usual_ns: array[int] = field(default_factory=lambda: array("q", (2**63 - 1,)) * NUM_SIZES)
    """The same times TIMES_P99, by size, for the C source; the largest number where too few are known."""
    num_noted: int = 0


class CallTimes:
    """Of all actors that are asked."""

    def __init__(self, longest_s: float) -> None:
        """longest_s: the deadline of answers of a size of which too few are known, and the longest of all."""
        self.longest_s = longest_s
        self._actors: dict[str, _Recent] = {}
        self._lock = threading.Lock()

    def begin(self, name: str, num_rows: int, num_experts: int) -> float:
        """A call is sent. Returns in how many seconds it must be answered."""
        with self._lock:
            recent = self._actors.setdefault(name, _Recent())
            recent.outstanding_rows += num_rows
            p99_s = recent.p99_s.get(num_rows.bit_length())
        if p99_s is None:
            return self.longest_s
        floor_s = FLOOR_S + EXPERT_FLOOR_S * num_experts
        return min(self.longest_s, max(floor_s, TIMES_P99 * p99_s))

    def end(self, name: str, num_rows: int, seconds: float | None, now_s: float) -> None:
        """A call that was begun is answered, after so many seconds; None where it was not."""
        with self._lock:
            recent = self._actors.get(name)
            if recent is None:  # the actor has left the roster meanwhile
                return
            recent.outstanding_rows -= num_rows
            if seconds is not None:
                _note(recent, num_rows, seconds, now_s)

    def usual_ns(self, name: str) -> array[int]:
        """By size of an answer, what it must not take longer than, but for what `begin` takes into account besides;
        kept up to date."""
        with self._lock:
            return self._actors.setdefault(name, _Recent()).usual_ns

    def note(self, name: str, answers: Iterable[tuple[int, float]], now_s: float) -> None:
        """Calls that were not begun here are answered: rows of each, and seconds."""
        with self._lock:
            recent = self._actors.get(name)
            if recent is not None:
                for num_rows, seconds in answers:
                    _note(recent, num_rows, seconds, now_s)

    def load(self, name: str, now_s: float) -> ActorLoad:
        with self._lock:
            recent = self._actors.get(name)
            if recent is None:
                return ActorLoad()
            is_fresh = now_s - recent.noted_at_s < FRESH_S
            return ActorLoad(recent.outstanding_rows, recent.row_s if is_fresh else NO_LOAD_ROW_S)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget actors that have left the roster."""
        with self._lock:
            for name in self._actors.keys() - set(names):
                del self._actors[name]

    def summary(self) -> dict[str, LatencySummary]:
        with self._lock:
            seconds = {
                name: sorted(second for window in recent.seconds.values() for second in window)
                for name, recent in self._actors.items()
            }
        return {
            name: LatencySummary(len(found), percentile(found, 0.5), percentile(found, 0.99))
            for name, found in sorted(seconds.items())
            if found
        }


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def _note(recent: _Recent, num_rows: int, seconds: float, now_s: float) -> None:
    row_s = max(0.0, seconds - MESSAGE_S) / num_rows
    is_first = recent.noted_at_s == float("-inf")
    recent.row_s = row_s if is_first else recent.row_s + SMOOTHING * (row_s - recent.row_s)
    recent.noted_at_s = now_s
    size = num_rows.bit_length()
    window = recent.seconds.setdefault(size, deque(maxlen=WINDOW))
    window.append(seconds)
    recent.num_noted += 1
    if len(window) >= ENOUGH and (size not in recent.p99_s or recent.num_noted % ENOUGH == 0):
        recent.p99_s[size] = p99_s = percentile(sorted(window), 0.99)
        recent.usual_ns[size] = round(TIMES_P99 * p99_s * 1e9)
