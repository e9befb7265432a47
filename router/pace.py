"""How much of a prompt is computed beside running streams, from what steps cost on this machine.

A prompt's rows go through the layers in a pass that may pause between any two, and a step of the running streams fits
into every pause. Many rows at once are what makes a prompt cheap, since they share each expert's weights; pauses are
what keeps streams going; so rows are many and layers few at a time. Learns from times that it is told and has no clock
of its own: equal times give equal decisions. Changes when something is computed, never what comes out. Called by
`router.engine`.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

LONGEST_STEPS = 2.5
"""What a step may take beside a prompt, in steps of the streams alone. Below the three that users are promised, for
layers that take longer than those before them."""
FIRST_ROWS = 64
"""Rows of a prompt's pass while nothing is known of this machine."""
CHOICES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
REMEMBERED = 9
"""Times of which the median counts."""
CONCAVITY = 0.7
"""Of a layer's time as a power of its rows, where only other numbers of rows have been timed."""


@dataclass(frozen=True)
class PromptBounds:
    """Most rows of prompts in the next step."""

    paused: int
    """In a pass of their own that pauses."""
    joined: int
    """In the pass of the running streams, which does not."""


class Pace:
    """One engine's. The same steps in the same times lead to the same bounds."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._stream_steps: deque[float] = deque(maxlen=REMEMBERED)
        self._layers: dict[int, deque[float]] = {}
        """By a choice of rows, seconds of a layer."""

    def note_streams(self, seconds: float) -> None:
        """A step of running streams took so long, without any prompt."""
        self._stream_steps.append(seconds)

    def note_layer(self, num_rows: int, seconds: float) -> None:
        """A layer took so long for a pass of so many rows."""
        choice = min(CHOICES, key=lambda rows: abs(rows - num_rows))
        known = self._layers.setdefault(choice, deque(maxlen=REMEMBERED))
        known.append(seconds * choice / num_rows if num_rows > choice else seconds)

    @property
    def longest_s(self) -> float | None:
        """What a step may take beside a prompt; None before any stream has run."""
        return LONGEST_STEPS * statistics.median(self._stream_steps) if self._stream_steps else None

    def layer_s(self, num_rows: int) -> float | None:
        """What a layer is expected to take; None where none was timed."""
        if not self._layers:
            return None
        nearest = min(self._layers, key=lambda rows: max(rows / num_rows, num_rows / rows))
        ratio = num_rows / nearest
        return statistics.median(self._layers[nearest]) * (ratio if ratio > 1 else ratio**CONCAVITY)

    def may_go_on(self, num_rows: int, spent_s: float) -> bool:
        """Whether a pass of so many rows may go through one more layer in a step that has taken so long already."""
        longest_s, layer_s = self.longest_s, self.layer_s(num_rows)
        return longest_s is not None and layer_s is not None and spent_s + layer_s <= longest_s

    def bounds(self, most: int) -> PromptBounds:
        """For the next step, which may have `most` rows."""
        longest_s = self.longest_s
        if longest_s is None or not self._layers:
            return PromptBounds(min(FIRST_ROWS, most), min(CHOICES[0], most))
        choices = [rows for rows in CHOICES if rows < most] + [most]
        room_s = longest_s * (1 - 1 / LONGEST_STEPS)
        joined = [rows for rows in choices if self._layer_s(rows) * self._num_layers <= room_s]
        return PromptBounds(max(choices, key=self._rate), joined[-1] if joined else choices[0])

    def _rate(self, num_rows: int) -> float:
        """Rows a second in a pass of so many, streams' steps included; those that do not fit come last."""
        assert self.longest_s is not None
        stream_s, layer_s = self.longest_s / LONGEST_STEPS, self._layer_s(num_rows)
        layers_a_step = int((self.longest_s - stream_s) / layer_s)
        if not layers_a_step:
            return -layer_s
        num_steps = -(-self._num_layers // layers_a_step)
        return num_rows / (num_steps * stream_s + self._num_layers * layer_s)

    def _layer_s(self, num_rows: int) -> float:
        found = self.layer_s(num_rows)
        assert found is not None
        return max(found, 1e-9)
