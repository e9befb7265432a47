"""Decodes a WAV file: whole numbers of 8 to 32 bits or floating point, any number of channels, which are averaged.

Only what the file holds is allocated, and bounded by it. Pure. Called by `gateway.media.decoder`.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gateway.media.errors import MediumRefused

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
MOST_CHANNELS = 8
RATES = (
    *(8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000),
    *(44_100, 48_000, 88_200, 96_000, 176_400, 192_000),
)
"""Samples a second. Others have no small ratio to the model's rate, and would take long to be brought to it."""
FRAMES_AT_ONCE = 1 << 18


class _Form(NamedTuple):
    """What a file's `fmt ` chunk says."""

    coding: int
    channels: int
    rate: int
    bits: int

    @property
    def frame_bytes(self) -> int:
        return self.channels * self.bits // 8


def decode_wav(content: bytes, most_seconds: float) -> tuple[NDArray[Any], int]:
    """(samples,) float32 from -1 to 1, and how many there are a second. Raises MediumRefused."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise MediumRefused("is no WAV file")
    form: _Form | None = None
    position = 12
    while position + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, position)
        begin = position + 8
        if name == b"fmt ":
            form = _read_form(content[begin : begin + min(length, 40)])
        elif name == b"data":
            if form is None:
                raise MediumRefused("is a damaged WAV file: its data come before what says how to read them")
            # A length of all ones, or one beyond the file, is what a program writes that streams.
            return _read_samples(memoryview(content)[begin : begin + length], form, most_seconds), form.rate
        position = begin + length + length % 2
    raise MediumRefused("is a damaged WAV file: it has no data")


def _read_form(chunk: bytes) -> _Form:
    if len(chunk) < 16:
        raise MediumRefused("is a damaged WAV file: its format is cut short")
    coding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if coding == EXTENSIBLE and len(chunk) >= 26:
        (coding,) = struct.unpack_from("<H", chunk, 24)
    if (coding, bits) not in ((PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)):
        raise MediumRefused(f"is a WAV file of {bits} bits in coding {coding}, which is not supported")
    if not 1 <= channels <= MOST_CHANNELS:
        raise MediumRefused(f"has {channels} channels; 1 to {MOST_CHANNELS} are taken")
    if rate not in RATES:
        raise MediumRefused(f"has {rate} samples a second; {', '.join(map(str, RATES))} are taken")
    return _Form(coding, channels, rate, bits)


def _read_samples(data: memoryview, form: _Form, most_seconds: float) -> NDArray[Any]:
    num_frames = len(data) // form.frame_bytes
    if num_frames > most_seconds * form.rate:
        raise MediumRefused(f"is {num_frames / form.rate:.1f} s long; at most {most_seconds:g} s are taken")
    mono = np.empty(num_frames, np.float32)
    for first in range(0, num_frames, FRAMES_AT_ONCE):
        end = min(first + FRAMES_AT_ONCE, num_frames)
        values = _as_numbers(data[first * form.frame_bytes : end * form.frame_bytes], form)
        mixed = values.reshape(-1, form.channels).mean(axis=1)
        if not np.isfinite(mixed).all():
            raise MediumRefused("has values that are no numbers")
        mono[first:end] = mixed.clip(-1.0, 1.0)
    return mono


def _as_numbers(data: memoryview, form: _Form) -> NDArray[Any]:
    """float64, -1 to 1."""
    if form.coding == FLOAT:
        return np.frombuffer(data, f"<f{form.bits // 8}").astype(np.float64)
    if form.bits == 8:
        return (np.frombuffer(data, np.uint8).astype(np.float64) - 128.0) / 128.0
    if form.bits == 24:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(data, f"<i{form.bits // 8}") / 2.0 ** (form.bits - 1)
