"""Whole layers to processes: one message a layer, and nobody to wait for but the one that has it. Pure.

Layers come one after another, so a token's time is the sum over layers of what the layer's process takes: there is
nothing to balance, and every layer goes to the process that is quickest with it and has room. The routers' own comes
first, since it costs no message. Called by `cluster.placement`; `docs/placement.md` says when this is the better way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.assignment import Trade
from cluster.errors import NoRoomForExperts
from cluster.layer_work import NOWHERE, Floats, Ints, SeatArrays, Work
from cluster.step_time import Seat


def assign_by_layer(work: Work, seats: Sequence[Seat], home_X: Ints, trade: Trade) -> Ints:
    """(X,) the seat of every expert, equal within a layer. home_X: as in `assign_by_expert`.

    A layer that fits no memory whole goes where the disk allows it; the hottest are then kept in memory.
    Raises NoRoomForExperts where neither has room for a whole layer.
    """
    arrays = SeatArrays(seats, work.row_bytes, int(work.bytes_X.max(initial=0)))
    time_LB = np.stack([arrays.hop_B + arrays.cost_EB(work, part).sum(axis=0) for part in work.layers])
    sizes_L = np.array([work.bytes_X[part].sum() for part in work.layers], dtype=np.int64)
    seat_L = np.full(len(work.layers), NOWHERE, dtype=np.int64)
    homes = [_home(home_X[part]) for part in work.layers]
    for layer, home in enumerate(homes):
        if home != NOWHERE and sizes_L[layer] <= min(arrays.memory_B[home], arrays.held_B[home]):
            _take(arrays, home, int(sizes_L[layer]))
            seat_L[layer] = home
    for layer in np.flatnonzero(seat_L == NOWHERE).tolist():
        seat_L[layer] = _quickest(work, arrays, layer, time_LB[layer])
    _move_what_pays(work, arrays, homes, seat_L, time_LB, trade)
    result = np.empty(len(work.keys), dtype=np.int64)
    for seat, part in zip(seat_L.tolist(), work.layers, strict=True):
        result[part] = seat
    return result


def _home(home_E: Ints) -> int:
    """Where the most of a layer is."""
    known_E = home_E[home_E != NOWHERE]
    return int(np.argmax(np.bincount(known_E))) if len(known_E) else NOWHERE


def _take(arrays: SeatArrays, seat: int, num_bytes: int) -> None:
    arrays.memory_B[seat] = max(0, int(arrays.memory_B[seat]) - num_bytes)
    arrays.held_B[seat] -= num_bytes


def _quickest(work: Work, arrays: SeatArrays, layer: int, time_B: Floats) -> int:
    part = work.layers[layer]
    size = int(work.bytes_X[part].sum())
    fits_B = (size <= arrays.memory_B) & (size <= arrays.held_B)
    on_disk_B = np.isfinite(arrays.disk_B) & arrays.is_usable_B & (size <= arrays.held_B)
    if not (fits_B | on_disk_B).any():
        raise NoRoomForExperts(int(work.bytes_X.sum()), int(arrays.room_B.sum()))
    reading_B = np.array([_reading_s(work, part, arrays, seat) for seat in range(len(time_B))])
    total_B = np.where(fits_B, time_B, np.where(on_disk_B, time_B + reading_B, np.inf))
    seat = int(np.argmin(total_B))
    _take(arrays, seat, size)
    return seat


def _reading_s(work: Work, part: slice, arrays: SeatArrays, seat: int) -> float:
    """Expected reading of a layer in a step when the hottest that fit are kept."""
    if not np.isfinite(arrays.disk_B[seat]):
        return 0.0
    bytes_E, needed_E = work.bytes_X[part], work.needed_X[part]
    order_E = np.argsort(-needed_E, kind="stable")
    is_absent_E = np.cumsum(bytes_E[order_E]) > arrays.memory_B[seat]
    return float((needed_E * bytes_E)[order_E][is_absent_E].sum() * arrays.disk_B[seat])


def _move_what_pays(
    work: Work, arrays: SeatArrays, homes: list[int], seat_L: Ints, time_LB: Floats, trade: Trade
) -> None:
    """Layers that stayed where they were, to a quicker process with room, if that wins the moved bytes back."""
    for layer, home in enumerate(homes):
        if home == NOWHERE or seat_L[layer] != home:
            continue
        size = int(work.bytes_X[work.layers[layer]].sum())
        fits_B = (size <= arrays.memory_B) & (size <= arrays.held_B)
        time_B = np.where(fits_B, time_LB[layer], np.inf)
        seat = int(np.argmin(time_B))
        gained_s = float(time_LB[layer, home]) - float(time_B[seat])
        if gained_s > 0 and gained_s * trade.horizon_steps >= arrays.loading_s(size, seat):
            arrays.memory_B[home] += size
            arrays.held_B[home] += size
            _take(arrays, seat, size)
            seat_L[layer] = seat
