"""Speaks replies from their requests to samples: a frame of every speech a step, and one speech's frames made sound.

Frames and the samples that they settle are told together, so that what was told of a speech is a function of its frames
alone and another router can go on behind it. Knows nothing of threads, HTTP or Ray. Driven by
`router.speech.speech_thread`.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from router.errors import SpeechFailed
from router.request import GenerationRequest, TokenEvent
from router.speech.speaker import Speaker, Spoken
from router.speech.speech import frames_of
from router.speech.utterance import Piece, Utterance
from router.speech.vocoder import Vocoder

logger = logging.getLogger(__name__)


@dataclass
class SoundStats:
    """Counters since the start."""

    samples: int = 0
    seconds: float = 0.0
    """Spent on making frames sound."""
    failed: int = 0
    """Speeches that ended by an error."""


class SpeechEngine:
    """Not safe for several threads."""

    def __init__(self, speaker: Speaker, vocoder: Vocoder) -> None:
        self.speaker, self.vocoder = speaker, vocoder
        self.stats = SoundStats()
        self._utterances: dict[str, Utterance] = {}
        self._ready: OrderedDict[str, Utterance] = OrderedDict()
        """In the order in which they became so."""

    @property
    def has_work(self) -> bool:
        return bool(self._utterances)

    @property
    def nbytes(self) -> int:
        """Resident bytes: weights, experts, the talker's keys and values."""
        parts = self.speaker.parts
        return parts.nbytes + parts.worker.resident_bytes + self.speaker.pool.nbytes + self.vocoder.nbytes

    @property
    def progressed_at(self) -> float:
        """When the talker last finished a layer, by the monotonic clock: experts may come from a slow disk."""
        return self.speaker.parts.talker.progressed_at

    @property
    def open_requests(self) -> list[str]:
        """Ids of all speeches that have not ended."""
        return list(self._utterances)

    def add(self, request: GenerationRequest, hidden_HD: Tensor | None) -> None:
        """Queue a speech; see `Speaker.add`. Raises PromptInvalid, RequestTooLong; ValueError for a used id."""
        self.speaker.add(request, hidden_HD)
        name, told = request.request_id, frames_of(request.generated_ids)
        self._utterances[name] = Utterance(name, told, self.vocoder.shape.lookback)

    def remove(self, request_id: str) -> bool:
        """End a speech. Returns False when it is not known (any more)."""
        self.speaker.remove(request_id)
        self._ready.pop(request_id, None)
        return self._utterances.pop(request_id, None) is not None

    def step(self) -> list[TokenEvent]:
        """The next frame of each, and the next piece of who has waited longest for one, or has heard nothing yet."""
        events = []
        for spoken in () if self._has_ended else self.speaker.step():
            if spoken.finish_reason == "error":
                events.append(self._fail(spoken.request_id, spoken.error))
            else:
                self._take(spoken)
        utterance = next((each for each in self._ready.values() if each.is_urgent), None)
        if utterance is None and self._ready:
            utterance = next(iter(self._ready.values()))
        if utterance is not None and (event := self._sound(utterance)) is not None:
            events.append(event)
        return events

    def load_more(self) -> bool:
        """Read an expert that is not there yet, where the budget has room. False where there is nothing to read."""
        return self.speaker.parts.worker.load_more()

    def close(self) -> None:
        self.speaker.close()

    @property
    def _has_ended(self) -> bool:
        """Whether all of some speech is drawn and not all is heard. Before others begin in its place it gives up its
        stream, so that there are never more of these than speeches that get frames."""
        return any(utterance.finish_reason is not None for utterance in self._utterances.values())

    def _take(self, spoken: Spoken) -> None:
        utterance = self._utterances[spoken.request_id]
        if spoken.frame:
            utterance.add(spoken.frame)
        utterance.finish_reason = spoken.finish_reason
        self._look(utterance.name)

    def _look(self, name: str) -> None:
        """Whether it has a piece now."""
        if name not in self._ready and self._utterances[name].is_ready:
            self._ready[name] = self._utterances[name]

    def _sound(self, utterance: Utterance) -> TokenEvent | None:
        name = utterance.name
        del self._ready[name]
        is_first, piece = utterance.is_urgent, utterance.take()
        try:
            samples = self._samples(utterance, piece)
        except SpeechFailed as error:
            logger.error("speech %s: %s", name, error.reason)
            return self._fail(name, str(error))
        if utterance.is_done:
            self.remove(name)
        else:
            self._look(name)
        if piece.is_known and not utterance.is_done:
            return None
        return TokenEvent(
            name,
            () if piece.is_known else tuple(code for frame in piece.frames for code in frame),
            utterance.finish_reason if utterance.is_done else None,
            is_first=is_first and bool(piece.frames),
            samples=b"" if piece.is_known else samples,
        )

    def _samples(self, utterance: Utterance, piece: Piece) -> bytes:
        if not piece.frames:
            return b""
        started = time.perf_counter()
        utterance.stream = utterance.stream or self.vocoder.stream(utterance.first)
        samples = self.vocoder.speak(utterance.stream, piece.frames)
        self.stats.samples += len(samples) // 2
        self.stats.seconds += time.perf_counter() - started
        return samples

    def _fail(self, name: str, error: str | None) -> TokenEvent:
        self.remove(name)
        self.stats.failed += 1
        return TokenEvent(name, (), "error", error)
