"""From parts of messages to media that a router takes, one at a time and within limits.

Nothing is fetched: an image comes in the request, as a data: URL. Called by `gateway.http.jobs` and the commands.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from gateway.media.errors import MediumRefused
from gateway.media.held_bytes import HeldBytes
from gateway.media.image_file import decode_image
from gateway.media.parts import AudioPart, ImagePart
from gateway.media.resampling import resample
from gateway.media.wav_file import decode_wav
from router.media.facts import LEAST_SAMPLES, MediaFacts
from router.media.items import SAMPLE_RATE, Image, Medium, Sound

MOST_MEDIA = 32
"""Of one request."""
MOST_SECONDS = 300.0
"""Of one sound: 3,900 tokens."""
MOST_HELD_BYTES = 1 << 30
"""Of all open requests' media, decoded and still to be: 270 images of the largest size. Those of one always fit."""
PIECE_CHARS = 1 << 18
"""Of base64, decoded at once; whole groups of four. Nobody else computes meanwhile in the process."""
DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)


class MediaDecoder:
    """Knows what a model takes. Decodes one medium at a time, so that its memory is bounded."""

    def __init__(self, facts: MediaFacts) -> None:
        self.facts = facts
        self.held = HeldBytes(MOST_HELD_BYTES)
        self._worker = ThreadPoolExecutor(1, "media")

    async def decode(self, part: ImagePart | AudioPart) -> Medium:
        """Beside the event loop. Raises MediumRefused, RouterBusy."""
        self.check_kind(Image if isinstance(part, ImagePart) else Sound)
        medium = await asyncio.get_running_loop().run_in_executor(self._worker, self._decode, part)
        self.held.hold(medium)
        return medium

    def check_kind(self, kind: type[Medium]) -> None:
        """Raises MediumRefused where the model does not take such."""
        if kind is Image and self.facts.image is None:
            raise MediumRefused("is an image, and none are taken here")
        if kind is Sound and self.facts.sound is None:
            raise MediumRefused("is sound, and none is taken here")

    def _decode(self, part: ImagePart | AudioPart) -> Medium:
        if isinstance(part, AudioPart):
            if part.format != "wav":
                raise MediumRefused("must be of format wav; others are not supported")
            return self.sound(_bytes(part.data))
        found = DATA_URL.match(part.url)
        if found is None:
            raise MediumRefused(
                "must be a data: URL with a PNG, JPEG or WebP image in base64; nothing is fetched from elsewhere"
            )
        return self.image(_bytes(part.url[found.end() :]))

    def image(self, content: bytes) -> Image:
        """Of a file's bytes. Raises MediumRefused."""
        self.check_kind(Image)
        assert self.facts.image is not None
        return decode_image(content, self.facts.image)

    def sound(self, content: bytes) -> Sound:
        """Of a file's bytes. Raises MediumRefused."""
        self.check_kind(Sound)
        samples, rate = decode_wav(content, MOST_SECONDS)
        resampled = resample(samples, rate, SAMPLE_RATE)
        if len(resampled) < LEAST_SAMPLES:
            raise MediumRefused(f"is shorter than {LEAST_SAMPLES / SAMPLE_RATE} s")
        return Sound(resampled.astype("<f4").tobytes())


def check_number(parts: Sequence[object]) -> None:
    """Raises MediumRefused."""
    if len(parts) > MOST_MEDIA:
        raise MediumRefused(f"come to {len(parts)} images and sounds; at most {MOST_MEDIA} are taken")


def _bytes(text: str) -> bytes:
    if text.find("=", 0, len(text) - 2) >= 0:
        raise MediumRefused("is not in base64")  # a piece may end with it, the whole may not go on behind it
    pieces = (text[first : first + PIECE_CHARS] for first in range(0, len(text), PIECE_CHARS))
    try:
        return b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in pieces)
    except ValueError as error:
        raise MediumRefused("is not in base64") from error
