"""An image or a sound as it travels from whoever decoded it to the router: checked, of the model's own size and rate.

Plain data without PyTorch. Made by `gateway.media`, part of a `router.request.GenerationRequest`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

SAMPLE_RATE = 16_000
"""Of all sound, in samples a second."""
SAMPLE_BYTES = 4


@dataclass(frozen=True)
class Image:
    """RGB, row by row, three bytes a pixel."""

    height: int
    width: int
    pixels: bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        return len(self.pixels)

    @cached_property
    def digest(self) -> bytes:
        """Names it: equal ones are encoded alike."""
        head = f"image {self.height} {self.width} ".encode()
        return hashlib.sha256(head + self.pixels).digest()


@dataclass(frozen=True)
class Sound:
    """One channel of SAMPLE_RATE, float32 from -1 to 1, least significant byte first."""

    samples: bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        return len(self.samples)

    @property
    def num_samples(self) -> int:
        return len(self.samples) // SAMPLE_BYTES

    @cached_property
    def digest(self) -> bytes:
        """Names it: equal ones are encoded alike."""
        return hashlib.sha256(b"sound " + self.samples).digest()


Medium = Image | Sound


@dataclass(frozen=True)
class PlacedMedium:
    """Which of a prompt's tokens stand for it: those from `first` on, as many as it has."""

    first: int
    medium: Medium
