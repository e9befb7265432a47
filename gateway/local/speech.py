"""An answer spoken in this process: from its tokens to samples, and to a file.

Called by `gateway.local.generate` and `gateway.chat.local`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.budget import BudgetRequest
from experts.store import ExpertStore
from gateway.errors import GenerationFailed, OptionInvalid
from gateway.http.speech import Delivery, SpeechEnd, choose_delivery, speech_request
from gateway.local.engine_events import Events, events_of
from gateway.media.wav_writing import wav_of
from gateway.output_file import write_output
from router.engine_thread import EngineThread
from router.errors import RouterError
from router.request import GenerationRequest
from router.speech.facts import read_speech_facts


@dataclass(frozen=True)
class SpeechChoice:
    """What a user asks for."""

    voice: str | None = None
    max_frames: int | None = None
    budget: BudgetRequest | None = None
    """Of the experts that speak; None means all of them."""


@dataclass(frozen=True)
class SpokenAnswer:
    """What was heard of an answer."""

    samples: bytes
    end: SpeechEnd
    first_sound_s: float
    """From the end of the text to the first samples; 0 where there are none."""

    def save(self, path: Path) -> None:
        """As WAV. Raises FileUnusable."""
        write_output(path, wav_of(self.samples))

    def as_json(self) -> dict[str, Any]:
        return {
            "frames": self.end.num_frames,
            "seconds": round(self.end.seconds, 3),
            "finish_reason": self.end.finish_reason,
            "first_sound_s": round(self.first_sound_s, 6),
        }


def choose_speech(store: ExpertStore, choice: SpeechChoice) -> Delivery:
    """Raises OptionInvalid, ConfigUnsupported."""
    facts = read_speech_facts(store.manifest)
    if facts is None:
        raise OptionInvalid("speech", "goes with a store that has a talker; this one has none")
    try:
        return choose_delivery(facts, choice.voice, choice.max_frames)
    except ValueError as error:
        raise OptionInvalid("voice", f"{error}, not {str(choice.voice)[:64]!r}") from error


def speak(
    thread: EngineThread,
    events: Events,
    request: GenerationRequest,
    delivery: Delivery,
    reply_ids: Sequence[int],
) -> Generator[tuple[bytes, SpeechEnd], None, None]:
    """Samples as they come, and how much there is with them; none for a reply without tokens. request: the text's.
    Closing the generator ends the work.

    Raises GenerationFailed.
    """
    if not reply_ids:
        return
    end = SpeechEnd()
    try:
        with closing(events_of(thread, events, speech_request(request, delivery, reply_ids))) as told:
            for event in told:
                end = end.after(event)
                yield event.samples, end
    except RouterError as error:
        raise GenerationFailed(str(error)) from error


def hear(
    thread: EngineThread,
    events: Events,
    request: GenerationRequest,
    delivery: Delivery,
    reply_ids: Sequence[int],
) -> SpokenAnswer:
    """All of it; see `speak`."""
    started, first_s = time.perf_counter(), 0.0
    samples, end = bytearray(), SpeechEnd()
    for piece, so_far in speak(thread, events, request, delivery, reply_ids):
        first_s = first_s or (time.perf_counter() - started if piece else 0.0)
        samples += piece
        end = so_far
    return SpokenAnswer(bytes(samples), end, first_s)
