"""What is spoken as a WAV file (pure): 16 bits, one channel. Called by `gateway.http.answers` and the commands."""

from __future__ import annotations

import struct

from router.speech.wish import SAMPLE_BYTES, SAMPLE_RATE

PCM = 1
HEAD = struct.Struct("<4sI4s4sIHHIIHH4sI")


def wav_of(samples: bytes) -> bytes:
    """samples: as `router.speech.wish` has them; none make a file without sound."""
    form = (PCM, 1, SAMPLE_RATE, SAMPLE_RATE * SAMPLE_BYTES, SAMPLE_BYTES, 8 * SAMPLE_BYTES)
    riff_bytes = HEAD.size - 8 + len(samples)
    return HEAD.pack(b"RIFF", riff_bytes, b"WAVE", b"fmt ", 16, *form, b"data", len(samples)) + samples
