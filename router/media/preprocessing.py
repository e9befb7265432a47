"""From pixels and samples to what the towers take: patches and log-mel spectra. Pure, on NumPy, one item at a time.

Source: `transformers`, image_processing_pil_qwen2_vl and feature_extraction_whisper. Called by `router.media.encoder`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.media.facts import HOP, ImageFacts
from router.media.items import SAMPLE_RATE, Image, Sound

Array = NDArray[Any]

WINDOW = 400
"""Samples that a frame of a spectrum looks at."""
FRAMES_AT_ONCE = 1024
LINEAR_HERTZ, MELS_A_HERTZ, OCTAVES = 1000.0, 3 / 200, 27 / np.log(6.4)
"""Slaney's scale: linear up to LINEAR_HERTZ, then logarithmic."""


def patches(image: Image, facts: ImageFacts) -> Array:
    """(patches, channels x frames x patch x patch) float32: the patches of one token side by side, token after token.

    Raises ValueError where the image's sides are no multiples of a token's, or its bytes do not fill them.
    """
    height, width, size, merge = image.height, image.width, facts.patch_size, facts.merge_size
    if height % facts.factor or width % facts.factor or not height * width:
        raise ValueError(f"an image of {height} x {width} pixels is not cut into tokens of {facts.factor}")
    if len(image.pixels) != height * width * 3:
        raise ValueError(f"{len(image.pixels)} bytes for an image of {height} x {width} pixels")
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(height, width, 3)
    scaled: Array = pixels.astype(np.float32) * np.float32(1 / 255)
    scaled = (scaled - np.array(facts.mean, np.float32)) / np.array(facts.std, np.float32)
    rows, columns = height // facts.factor, width // facts.factor
    cut = scaled.reshape(rows, merge, size, columns, merge, size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(cut[:, :, :, :, :, None], facts.temporal_patch_size, axis=5)
    return frames.reshape(rows * columns * merge**2, -1)


def log_mel(sound: Sound, num_mel_bins: int) -> Array:
    """(mel bins, frames) float32, one frame for each HOP samples.

    In float64 until the end, and without a matrix library: the number of threads changes nothing. Raises ValueError for
    a sound that is shorter than a window, or has values that are no numbers.
    """
    samples = np.frombuffer(sound.samples, "<f4").astype(np.float64)
    if len(samples) <= WINDOW or not np.isfinite(samples).all():
        raise ValueError("a sound is too short, or has values that are no numbers")
    num_frames = len(samples) // HOP
    padded = np.pad(samples, WINDOW // 2, mode="reflect")
    windows: Array = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:num_frames]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    filters = mel_filters(num_mel_bins)
    mels = np.empty((num_mel_bins, num_frames))
    for first in range(0, num_frames, FRAMES_AT_ONCE):
        part = windows[first : first + FRAMES_AT_ONCE]
        power = np.abs(np.fft.rfft(part * hann)) ** 2
        mels[:, first : first + len(part)] = np.einsum("bm,fb->mf", filters, power)
    logs = np.log10(np.maximum(mels, 1e-10))
    logs = np.maximum(logs, logs.max() - 8.0)
    result: Array = ((logs + 4.0) / 4.0).astype(np.float32)
    return result


@cache
def mel_filters(num_mel_bins: int) -> Array:
    """(frequencies, mel bins): triangles of equal area on Slaney's scale, from 0 to 8,000 Hz."""
    num_bins = 1 + WINDOW // 2
    frequencies = np.linspace(0, SAMPLE_RATE / 2, num_bins)
    edges = _hertz(np.linspace(0, _mel(SAMPLE_RATE / 2), num_mel_bins + 2))
    widths = np.diff(edges)
    slopes = edges[None, :] - frequencies[:, None]
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    triangles: Array = np.maximum(0, np.minimum(rising, falling))
    return triangles * (2.0 / (edges[2:] - edges[:-2]))


def _mel(hertz: float) -> float:
    """Of a frequency above LINEAR_HERTZ."""
    return float(LINEAR_HERTZ * MELS_A_HERTZ + np.log(hertz / LINEAR_HERTZ) * OCTAVES)


def _hertz(mels: Array) -> Array:
    bend = LINEAR_HERTZ * MELS_A_HERTZ
    above = LINEAR_HERTZ * np.exp((np.maximum(mels, bend) - bend) / OCTAVES)
    bent: Array = np.where(mels < bend, mels / MELS_A_HERTZ, above)
    return bent
