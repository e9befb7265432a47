"""What is asked for when a reply is to be spoken. Plain data, shared by the router and the gateway."""

from __future__ import annotations

from dataclasses import dataclass

NUM_CODES = 16
"""Codes of a frame, in every published model that speaks; a store with another number is refused."""
SAMPLE_RATE = 24_000
"""Of what is spoken, in samples a second; one channel."""
SAMPLE_BYTES = 2
SAMPLES_OF_FRAME = 1920
"""A frame is 80 ms."""


@dataclass(frozen=True)
class SpeechWish:
    """Makes a request one for speech: its prompt and media are those of the reply, and what it draws are codes, frame
    by frame and `NUM_CODES` of each, which events report as tokens; `max_tokens` bounds the frames."""

    reply_ids: tuple[int, ...]
    """The reply's tokens as the text's request has reported them, the one that ended it included."""
    voice: str
    """One of the store's, in small letters."""
