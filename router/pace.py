"""How much of a prompt is computed beside running streams, from what steps cost on this machine.

A prompt's rows go through the layers in a pass that may pause between any two halves of layers, and a step of the
running streams fits into every pause. Many rows at once are what makes a prompt cheap, since they share each expert's
weights; pauses are what keeps streams going. Attention by our own products and a layer's experts pause in the middle
when their time is up, so rows are as many as a step may have; of other halves it must be known what they take, and
there are as many rows as fit. Learns from times that it is told and has no clock of its own: equal times give equal
decisions. Changes when something is computed, never what comes out. Called by `router.engine`.
"""

from __future__ import annotations

import statistics
from collections import deque
from functools import cache

from router.step_batch import Half

LONGEST_STEPS = 2.25
"""What a step may take beside a prompt, in steps of the streams alone. Below the three that users are promised, for
what takes longer than before, and for what is begun just before time is up."""
LEAST_STEPS = 0.25
"""What a pass that pauses gets of every step all the same, where the streams have taken longer than before."""
LATE_STEPS = 0.5
"""How late the rows of a pass may let a pause come, likewise: its work is in pieces, which grow with them."""
LATE_KEPT = 0.99
"""Of the latest so far, after every pause."""
SURE_ROWS = 512
"""Of a pass that can pause in the middle of halves, however late."""
FIRST_ROWS = 64
"""Rows of a prompt's pass while nothing is known of this machine."""
CHOICES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
OVERTAKING_SHARE = 0.25
"""Of what is left of a pass: the most that one which overtakes it may take."""
REMEMBERED = 9
"""Times of which the median counts."""
MOST_SLOWED = 2.0
"""A stream's own part of a step beside a prompt takes longer than alone, since the caches have the prompt's. More than
this is taken for streams that have grown since they were alone."""
CONCAVITY = 0.7
"""Of a layer's time as a power of its rows, where only other numbers of rows have been timed."""


class Pace:
    """One engine's. The same steps in the same times lead to the same decisions."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._alone: dict[int, deque[float]] = {}
        """By the size of the number of streams, what their steps took without a prompt's pass on its way."""
        self._beside: dict[int, deque[float]] = {}
        """The same with one."""
        self._size = 0
        """Of the number that ran last."""
        self._layers: dict[int, deque[float]] = {}
        """By a choice of rows, seconds of a layer."""
        self._halves: dict[Half, dict[int, deque[float]]] = {"attention": {}, "experts": {}}
        """The same of halves that cannot pause in the middle."""
        self._late_s: float | None = None
        """From when a pass was to pause in the middle of a half to when it did, at most of late, by rows."""

    def note_streams(self, seconds: float, num_streams: int = 1, *, is_beside: bool = False) -> None:
        """A step of so many running streams took so long. is_beside: while a prompt's pass pauses."""
        self._size = num_streams.bit_length()
        steps = self._beside if is_beside else self._alone
        steps.setdefault(self._size, deque(maxlen=REMEMBERED)).append(seconds)

    def note_layer(self, num_rows: int, seconds: float) -> None:
        """A layer took so long for a pass of so many rows."""
        _note(self._layers, num_rows, seconds)

    def note_half(self, half: Half, num_rows: int, seconds: float) -> None:
        """The same of half a layer that cannot pause in the middle."""
        _note(self._halves[half], num_rows, seconds)

    def note_pause(self, num_rows: int, late_s: float) -> None:
        """A pass of so many rows has paused in the middle of a half, so long after it was to."""
        self._late_s = max(late_s / num_rows, LATE_KEPT * (self._late_s or 0.0))

    @property
    def longest_s(self) -> float | None:
        """What a step may take beside a prompt, by as many streams as ran last; None before any has run."""
        alone_s, beside_s = _median_at(self._alone, self._size), _median_at(self._beside, self._size)
        if alone_s is not None and beside_s is not None:
            alone_s = min(max(alone_s, beside_s / MOST_SLOWED), beside_s)
        known_s = beside_s if alone_s is None else alone_s
        return None if known_s is None else LONGEST_STEPS * known_s

    @property
    def least_s(self) -> float:
        """What a pass that pauses gets of every step, however long the streams took."""
        return LEAST_STEPS / LONGEST_STEPS * (self.longest_s or 0.0)

    def layer_s(self, num_rows: int) -> float | None:
        """What a layer is expected to take; None where none was timed."""
        return _expected(self._layers, num_rows)

    def half_s(self, half: Half, num_rows: int) -> float | None:
        """The same of half a layer: no more than a layer where none was timed."""
        return _expected(self._halves[half], num_rows) if self._halves[half] else self.layer_s(num_rows)

    def may_go_on(self, half: Half, num_rows: int, left_s: float) -> bool:
        """Whether half a layer for so many rows fits into what is left of a step."""
        half_s = self.half_s(half, num_rows)
        return half_s is not None and half_s <= left_s

    def most_rows(self, most: int, divisible: frozenset[Half] = frozenset()) -> int:
        """Of prompts in a new pass that pauses, at most `most`. divisible: halves that can pause in the middle."""
        longest_s, whole = self.longest_s, tuple(half for half in self._halves if half not in divisible)
        if not whole:
            return self._most_punctual(most)
        if longest_s is None or not self._layers:
            return min(FIRST_ROWS, most)
        choices = [rows for rows in CHOICES if rows < most] + [most]
        room_s = longest_s * (1 - 1 / LONGEST_STEPS)
        return max(choices, key=lambda rows: self._rate(rows, whole, room_s))

    def _most_punctual(self, most: int) -> int:
        """At most so many rows that a pass of them still pauses in time."""
        if self._late_s is None or self.longest_s is None:
            return min(SURE_ROWS, most)
        room_s = LATE_STEPS / LONGEST_STEPS * self.longest_s
        return min(most, max(SURE_ROWS, int(room_s / max(self._late_s, 1e-9))))

    def most_overtaking(self, num_rows: int, layers_left: int, overtaken_s: float = 0.0) -> int:
        """Of prompts that overtake a pass of so many rows: 0 where none is worth it. layers_left: of that pass. Where
        experts are read from disk, few rows take nearly as long as many, and wait. overtaken_s: what others that
        overtook it have taken beyond what it has had since, which it has first: prompts without end take half of the
        time."""
        layer_s = self.layer_s(num_rows)
        if layer_s is None or overtaken_s > 0:
            return 0
        room_s = OVERTAKING_SHARE * layers_left * layer_s
        fewer = (rows for rows in CHOICES if rows <= num_rows // 2)
        return max((rows for rows in fewer if self._num_layers * self._layer_s(rows) <= room_s), default=0)

    def _rate(self, num_rows: int, whole: tuple[Half, ...], room_s: float) -> float:
        """Rows a second in a pass of so many, streams' steps included; those that do not fit come last. whole: halves
        that cannot pause. room_s: what a step has for them."""
        stream_s, layer_s = room_s / (LONGEST_STEPS - 1), self._layer_s(num_rows)
        longest_s = max(self.half_s(half, num_rows) or layer_s for half in whole)
        if longest_s > room_s:
            return -longest_s
        filled_s = int(room_s / longest_s * (1 + 1e-9)) * longest_s
        num_steps = -(-self._num_layers * layer_s // filled_s)
        return num_rows / (num_steps * stream_s + self._num_layers * layer_s)

    def _layer_s(self, num_rows: int) -> float:
        found = self.layer_s(num_rows)
        assert found is not None
        return max(found, 1e-9)


def _median_at(steps: dict[int, deque[float]], size: int) -> float | None:
    return statistics.median(steps[size]) if size in steps else None


def _note(times: dict[int, deque[float]], num_rows: int, seconds: float) -> None:
    choice = _choice_for(num_rows)
    known = times.setdefault(choice, deque(maxlen=REMEMBERED))
    known.append(seconds * choice / num_rows if num_rows > choice else seconds)


@cache
def _choice_for(num_rows: int) -> int:
    return min(CHOICES, key=lambda rows: abs(rows - num_rows))


def _expected(times: dict[int, deque[float]], num_rows: int) -> float | None:
    if not times:
        return None
    nearest = min(times, key=lambda rows: max(rows / num_rows, num_rows / rows))
    ratio = num_rows / nearest
    return statistics.median(times[nearest]) * (ratio if ratio > 1 else ratio**CONCAVITY)
