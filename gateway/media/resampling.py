"""Brings sound from one rate to another: a windowed sinc, cut into one filter for each place between two samples.

Pure, in float64. What both rates can hold passes up to nine tenths of the lower one's highest frequency; what it cannot
hold is 80 dB below. Called by `gateway.media.decoder`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF_WAVES = 48
"""Of the sinc on each side, at the lower of the two rates."""
BETA = 8.0
"""Of the Kaiser window: 80 dB."""
PASSED = 0.95
"""Middle of the slope, of the lower rate's highest frequency."""
OUTPUTS_AT_ONCE = 1 << 15
"""With the samples that they are made of; bounds memory in float64."""


def resample(samples: NDArray[Any], rate: int, wanted: int) -> NDArray[Any]:
    """(ceil(n * wanted / rate),) float32. For rates with a large common divisor: there are `wanted` by it filters."""
    if rate == wanted:
        return samples.astype(np.float32)
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    filters = _filters(up, down)
    reach = filters.shape[1] // 2
    num_outputs = -(-len(samples) * up // down)
    padded = np.pad(samples.astype(np.float32, copy=False), (reach, reach + down))
    result = np.empty(num_outputs, np.float32)
    block = max(1, OUTPUTS_AT_ONCE // up)  # in periods, after each of which the filters begin anew
    for first in range(0, num_outputs, block * up):
        begin = first // up * down
        part = padded[begin : begin + (block + 1) * down + filters.shape[1]].astype(np.float64)
        windows = np.lib.stride_tricks.sliding_window_view(part, filters.shape[1])
        made = result[first : first + block * up]
        for output in range(min(up, len(made))):
            centre, phase = divmod(output * down, up)
            alike = made[output::up]
            alike[:] = np.einsum("nt,t->n", windows[centre::down][: len(alike)], filters[phase])
    return result


def _filters(up: int, down: int) -> NDArray[Any]:
    """(up, taps): what each place between two samples takes of those around it."""
    stretch = max(1.0, down / up)
    reach = math.ceil(HALF_WAVES * stretch)
    taps = np.arange(-reach, reach + 1)
    distance = (taps[None, :] - np.arange(up)[:, None] / up) / stretch
    inside = np.clip(1.0 - (distance / HALF_WAVES) ** 2, 0.0, None)
    window = np.where(np.abs(distance) <= HALF_WAVES, np.i0(BETA * np.sqrt(inside)) / np.i0(BETA), 0.0)
    filters: NDArray[Any] = PASSED * np.sinc(PASSED * distance) * window
    filters /= filters.sum(axis=1, keepdims=True)
    return filters
