"""A model's experts and the processes for them, as arrays: what both ways of dividing work compute with. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cluster.demand import Demand
from cluster.step_time import Seat
from extraction.manifest import ExpertKey

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
NOWHERE = -1


@dataclass(frozen=True)
class Work:
    """X experts in the order of their keys, and what one step asks of them."""

    keys: tuple[ExpertKey, ...]
    bytes_X: Ints
    needed_X: Floats
    """Probability that a step needs the expert at all."""
    rows_X: Floats
    """Expected rows in a step."""
    layers: tuple[slice, ...]
    row_bytes: int
    partners: tuple[tuple[tuple[int, float], ...], ...]
    """Of each expert: others of its layer, and how often both are used at once."""


def work_of(demand: Demand, num_streams: int = 1) -> Work:
    """num_streams: tokens that are computed together in a step."""
    keys = tuple(sorted(demand.sizes))
    index = {key: number for number, key in enumerate(keys)}
    uses_X = np.array([demand.uses[key] for key in keys])
    bounds = [n for n, key in enumerate(keys) if n == 0 or key[:2] != keys[n - 1][:2]] + [len(keys)]
    partners: list[list[tuple[int, float]]] = [[] for _ in keys]
    for (first, second), use in sorted(demand.together.items()):
        partners[index[first]].append((index[second], use))
        partners[index[second]].append((index[first], use))
    return Work(
        keys,
        np.array([demand.sizes[key] for key in keys], dtype=np.int64),
        1.0 - (1.0 - np.minimum(uses_X, 1.0)) ** num_streams,
        uses_X * num_streams,
        tuple(slice(start, end) for start, end in pairwise(bounds)),
        demand.row_bytes,
        tuple(map(tuple, partners)),
    )


class SeatArrays:
    """B seats as arrays; `memory_B` and `held_B` are what is left, and go down as experts are seated."""

    def __init__(self, seats: Sequence[Seat], row_bytes: int, largest_bytes: int) -> None:
        self.hop_B = np.array([seat.hop_s(row_bytes) for seat in seats])
        self.byte_s_B = np.array([seat.byte_s for seat in seats])
        self.disk_B = np.array([seat.disk_byte_s for seat in seats])
        self.link_B = np.array([seat.link_byte_s for seat in seats])
        self.room_B = np.array([seat.room_bytes for seat in seats], dtype=np.int64)
        # Less memory than one expert is of no use, with or without a disk.
        self.is_usable_B = self.room_B >= largest_bytes
        self.memory_B = np.where(self.is_usable_B, self.room_B, 0)
        self.held_B = np.where(self.is_usable_B, [seat.most_bytes for seat in seats], 0)

    def cost_EB(self, work: Work, part: slice) -> Floats:
        """Expected seconds of a layer's E experts on each seat, when they are in memory there."""
        weights_E = work.needed_X[part] * work.bytes_X[part]
        rows_E = work.rows_X[part] * work.row_bytes
        cost: Floats = np.outer(weights_E, self.byte_s_B) + np.outer(rows_E, self.link_B)
        return cost

    def loading_s(self, num_bytes: int, seat: int) -> float:
        """What it takes to bring experts to a seat: over its link, or from the disk beside the routers."""
        link_s, disk_s = float(self.link_B[seat]), float(self.disk_B[seat])
        return num_bytes * (link_s or (disk_s if np.isfinite(disk_s) else 0.0))

    def reading_EB(self, work: Work, part: slice) -> Floats:
        """What reading from disk adds."""
        reading: Floats = np.outer(work.needed_X[part] * work.bytes_X[part], self.disk_B)
        return reading


def water_level(weight_bytes: float, hop_B: Floats, byte_s_B: Floats) -> float:
    """The time in which all machines together could do a layer's work if it could be cut anywhere: a lower bound.

    Each one that takes part takes (time - hop) / byte_s bytes; one whose hop is longer takes none. 0 for no machine.
    """
    if not len(hop_B):
        return 0.0
    order_B = np.argsort(hop_B, kind="stable")
    rates_B = 1.0 / byte_s_B[order_B]
    rate, paid = np.cumsum(rates_B), np.cumsum(rates_B * hop_B[order_B])
    return float(np.min((weight_bytes + paid) / rate))
