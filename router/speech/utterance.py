"""One speech between the talker and the listener: frames that are drawn and not heard yet. Owned by
`router.speech.speech_engine`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from router.request import FinishReason
from router.speech.speech import Frame
from router.speech.vocoder import FRAMES_AT_ONCE, VoiceStream


class Piece(NamedTuple):
    """What is made sound next."""

    frames: tuple[Frame, ...]
    is_known: bool
    """Whether the listener has heard it from another router: it only brings the stream to where that one was."""


class Utterance:
    """Frames go in one by one, and out in pieces: the first alone, so that it is heard at once, then ever more of them,
    for which weights are read once."""

    def __init__(self, name: str, told: Sequence[Frame] = (), lookback: int = 0) -> None:
        """told: frames that the listener has had, of which the last `lookback` are needed for those behind them."""
        self.name = name
        self.first = max(0, len(told) - lookback)
        """Where its stream begins."""
        self.stream: VoiceStream | None = None
        self.finish_reason: FinishReason | None = None
        self._known = deque(told[self.first :])
        self._pending: deque[Frame] = deque()
        self._num_heard = 0

    def add(self, frame: Frame) -> None:
        self._pending.append(frame)

    @property
    def is_ready(self) -> bool:
        """Whether there is a piece to take, or nothing left but the end to tell."""
        wanted = min(self._num_heard + 1, FRAMES_AT_ONCE)
        return bool(self._known) or self.finish_reason is not None or len(self._pending) >= wanted

    @property
    def is_urgent(self) -> bool:
        """Whether the listener has heard nothing yet."""
        return not self._num_heard and not self._known

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None and not self._known and not self._pending

    def take(self) -> Piece:
        """The next piece; empty where only the end is left."""
        frames = self._known or self._pending
        is_known = bool(self._known)
        taken = tuple(frames.popleft() for _ in range(min(len(frames), FRAMES_AT_ONCE)))
        self._num_heard += 0 if is_known else len(taken)
        return Piece(taken, is_known)
