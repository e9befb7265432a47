"""Many experts in few words. Pure; used by the supervisor's status and by what `serve` and `status` print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from extraction.manifest import ExpertKey

MOST_NAMED = 8
"""Layers whose experts are named in a line."""


def by_layer(keys: Iterable[ExpertKey]) -> dict[str, list[int]]:
    """Numbers of experts by "component/layer"."""
    layers: dict[str, list[int]] = {}
    for key in sorted(keys):
        layers.setdefault(f"{key.component}/{key.layer}", []).append(key.expert)
    return layers


def name_experts(layers: Mapping[str, Sequence[int]]) -> str:
    """As `thinker/3: 0-7, 12; ...`, the first layers only."""
    named = [f"{layer}: {ranges(experts)}" for layer, experts in list(layers.items())[:MOST_NAMED]]
    more = len(layers) - MOST_NAMED
    return "; ".join(named) + (f"; and {more} more layers" if more > 0 else "")


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers as `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
