"""Which process computes which experts, layer by layer, so that the slowest one is as fast as it can be. Pure.

A layer waits for its slowest process, so what is balanced is expected time: uses times bytes by speed, and the hop.
Hottest first, each expert goes where it would be done soonest (longest processing time first, for machines of unequal
speed), then single moves and swaps away from the slowest improve that. A node's memory is divided among layers by
their bytes; an expert beyond it costs the reading as well. What has a home stays there unless a layer gains more over
the horizon than the moved bytes cost. Called by `cluster.placement`; `cluster.layer_ranges` is the other way to divide.

Source of the first step: R. Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17, 1969.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.errors import NoRoomForExperts
from cluster.layer_work import NOWHERE, Bools, Floats, Ints, SeatArrays, Work, water_level
from cluster.step_time import Seat

LEAST_GAIN = 0.01
"""Of the slowest's time: less is not worth a move."""


@dataclass(frozen=True)
class Trade:
    """What balance may be given up for."""

    slack: float
    """How far above the best possible time a layer may go for fewer messages."""
    message_s: float
    """The router's work for one message."""
    horizon_steps: float
    """Steps within which a move of a placed expert must have paid for itself."""


def assign_by_expert(work: Work, seats: Sequence[Seat], home_X: Ints, trade: Trade) -> Ints:
    """(X,) the seat of every expert. home_X: where each one is now, or NOWHERE. Raises NoRoomForExperts.

    Takes about E x B for each layer of E experts on B seats, and as much for each move that improves it.
    """
    arrays = SeatArrays(seats, work.row_bytes, int(work.bytes_X.max(initial=0)))
    total, seen = int(work.bytes_X.sum()), 0
    fits_in_memory = total <= int(arrays.memory_B.sum())
    result = np.full(len(work.keys), NOWHERE, dtype=np.int64)
    for part in work.layers:
        seen += int(work.bytes_X[part].sum())
        # What earlier layers left of their share goes on to this one.
        allowed_B = np.array([int(room) * seen // total for room in arrays.room_B], dtype=np.int64)
        quota_B = np.minimum(allowed_B - (arrays.room_B - arrays.memory_B), arrays.memory_B)
        layer = _Layer(work, part, arrays, quota_B, trade, fits_in_memory)
        result[part] = layer.assign(home_X[part])
    return result


class _Saved(NamedTuple):
    """A layer's state at a moment; see `_Layer`."""

    seat_E: Ints
    busy_B: Floats
    count_B: Ints
    in_memory_E: Bools
    memory_B: Ints
    held_B: Ints
    quota_B: Ints


class _Layer:
    """One layer's E experts while they are seated. Changes the memory that is left in its arrays."""

    def __init__(
        self, work: Work, part: slice, arrays: SeatArrays, quota_B: Ints, trade: Trade, fits_in_memory: bool
    ) -> None:
        self.work, self.first, self.arrays, self.trade = work, part.start, arrays, trade
        self.quota_B, self.fits_in_memory = quota_B, fits_in_memory
        self.bytes_E = work.bytes_X[part]
        self.cost_EB = arrays.cost_EB(work, part)
        self.reading_EB = arrays.reading_EB(work, part)
        self.order_E = np.argsort(-work.needed_X[part], kind="stable")
        num_seats = len(arrays.hop_B)
        self.busy_B, self.count_B = np.zeros(num_seats), np.zeros(num_seats, dtype=np.int64)
        self.seat_E = np.full(len(self.bytes_E), NOWHERE, dtype=np.int64)
        self.in_memory_E = np.zeros(len(self.bytes_E), dtype=bool)
        weight_bytes = float((work.needed_X[part] * self.bytes_E).sum())
        is_usable_B = arrays.is_usable_B
        self.level = water_level(weight_bytes, arrays.hop_B[is_usable_B], arrays.byte_s_B[is_usable_B])
        self.good_level = self.level * (1.0 + LEAST_GAIN)
        """The time at which a layer is good enough."""
        self.has_pairs = False

    def assign(self, home_E: Ints) -> Ints:
        if any(self.work.partners[self.first + expert] for expert in range(len(home_E))):
            start = self._saved()
            self._balance(home_E)
            self.good_level = float(self.busy_B.max()) * (1.0 + self.trade.slack)
            self._restore(start)
            self.has_pairs = True
        return self._balance(home_E)

    def _balance(self, home_E: Ints) -> Ints:
        for expert in self.order_E[home_E[self.order_E] != NOWHERE].tolist():
            self._try(expert, int(home_E[expert]))
        for expert in self.order_E[self.seat_E[self.order_E] == NOWHERE].tolist():
            self._seat_soonest(expert)
        before = self._saved()
        self._improve()
        if not self._pays(home_E, before):
            self._restore(before)
        return self.seat_E

    def _memory_ok(self, expert: int, limit_B: Ints) -> Bools:
        num_bytes = self.bytes_E[expert]
        is_ok: Bools = (num_bytes <= limit_B) & (num_bytes <= self.arrays.held_B)
        return is_ok

    def _disk_ok(self, expert: int) -> Bools:
        arrays = self.arrays
        is_ok: Bools = (
            np.isfinite(arrays.disk_B) & arrays.is_usable_B & (self.bytes_E[expert] <= arrays.held_B)
        )
        return is_ok

    def _try(self, expert: int, seat: int) -> None:
        """Leave an expert where it is, if there is still room."""
        if self._memory_ok(expert, self.arrays.memory_B)[seat]:
            self._put(expert, seat, True)
        elif self._disk_ok(expert)[seat]:
            self._put(expert, seat, False)

    def _seat_soonest(self, expert: int) -> None:
        """Where it is done first; where its partners are, if the layer's best time is not exceeded by much. On a disk
        only if no memory takes it: on average reading is cheap, but the step that has to read waits long."""
        in_memory_B = self._memory_ok(expert, self.quota_B)
        if not in_memory_B.any() and self.fits_in_memory:
            in_memory_B = self._memory_ok(expert, self.arrays.memory_B)
        is_ok_B = in_memory_B
        if not is_ok_B.any():
            is_ok_B = self._disk_ok(expert)
        if not is_ok_B.any():
            is_ok_B = in_memory_B = self._memory_ok(expert, self.arrays.memory_B)
        if not is_ok_B.any():
            raise NoRoomForExperts(int(self.work.bytes_X.sum()), int(self.arrays.room_B.sum()))
        done_B = self.busy_B + np.where(self.count_B == 0, self.arrays.hop_B, 0.0) + self.cost_EB[expert]
        if not in_memory_B.any():
            done_B += self.reading_EB[expert]
        done_B[~is_ok_B] = np.inf
        seat = int(np.argmin(done_B))
        if self.has_pairs:
            near_B = np.where(done_B <= self.good_level, self._nearness(expert), 0.0)
            if near_B.max() > 0.0:
                seat = int(np.argmax(near_B))
        self._put(expert, seat, bool(in_memory_B[seat]))

    def _nearness(self, expert: int) -> Floats:
        """Seconds of messages saved by sitting with partners, less the time in which the two could have been
        computed side by side. Not above 0 where computing an expert takes longer than a message."""
        near_B = np.zeros(len(self.busy_B))
        for other, use in self.work.partners[self.first + expert]:
            seat = self.seat_E[other - self.first]
            if seat != NOWHERE:
                near_B[seat] += use
        arrays = self.arrays
        saved_B = self.trade.message_s + self.work.row_bytes * arrays.link_B
        near_B *= np.maximum(0.0, saved_B - self.bytes_E[expert] * arrays.byte_s_B)
        return near_B

    def _put(self, expert: int, seat: int, in_memory: bool) -> None:
        arrays, num_bytes = self.arrays, self.bytes_E[expert]
        time_s = self.cost_EB[expert, seat] + (0.0 if in_memory else self.reading_EB[expert, seat])
        self.busy_B[seat] += time_s + (arrays.hop_B[seat] if self.count_B[seat] == 0 else 0.0)
        self.count_B[seat] += 1
        self.seat_E[expert], self.in_memory_E[expert] = seat, in_memory
        arrays.held_B[seat] -= num_bytes
        if in_memory:
            arrays.memory_B[seat] -= num_bytes
            self.quota_B[seat] -= num_bytes

    def _take(self, expert: int) -> None:
        """Of an expert in memory; the opposite of `_put`."""
        arrays, num_bytes, seat = self.arrays, self.bytes_E[expert], self.seat_E[expert]
        self.count_B[seat] -= 1
        self.busy_B[seat] -= self.cost_EB[expert, seat]
        if self.count_B[seat] == 0:
            self.busy_B[seat] = 0.0
        self.seat_E[expert] = NOWHERE
        arrays.held_B[seat] += num_bytes
        arrays.memory_B[seat] += num_bytes
        self.quota_B[seat] += num_bytes

    def _improve(self) -> None:
        for _ in range(2 * len(self.seat_E)):
            slowest = int(np.argmax(self.busy_B))
            if self.busy_B[slowest] <= self.good_level:
                return
            experts_N = np.flatnonzero((self.seat_E == slowest) & self.in_memory_E)
            if not len(experts_N) or not (self._move(slowest, experts_N) or self._swap(slowest, experts_N)):
                return

    def _move(self, slowest: int, experts_N: Ints) -> bool:
        """Give one expert of the slowest away, so that neither is as slow as it was."""
        arrays, busy = self.arrays, self.busy_B[slowest]
        left_N = busy - self.cost_EB[experts_N, slowest]
        if self.count_B[slowest] == 1:
            left_N = np.zeros_like(left_N)
        taken_NB = self.busy_B + np.where(self.count_B == 0, arrays.hop_B, 0.0) + self.cost_EB[experts_N]
        worst_NB = np.maximum(left_N[:, None], taken_NB)
        sizes_N1 = self.bytes_E[experts_N][:, None]
        worst_NB[(sizes_N1 > self.quota_B) | (sizes_N1 > arrays.held_B)] = np.inf
        worst_NB[:, slowest] = np.inf
        row, seat = divmod(int(np.argmin(worst_NB)), worst_NB.shape[1])
        if worst_NB[row, seat] > busy * (1.0 - LEAST_GAIN):
            return False
        expert = int(experts_N[row])
        self._take(expert)
        self._put(expert, seat, True)
        return True

    def _swap(self, slowest: int, experts_N: Ints) -> bool:
        """Exchange one expert of the slowest for a colder one of another."""
        arrays, busy = self.arrays, self.busy_B[slowest]
        others_M = np.flatnonzero((self.seat_E != slowest) & self.in_memory_E)
        if not len(others_M):
            return False
        seats_M = self.seat_E[others_M]
        here_NM = busy - self.cost_EB[experts_N, slowest][:, None] + self.cost_EB[others_M, slowest]
        there_NM = self.busy_B[seats_M] - self.cost_EB[others_M, seats_M]
        there_NM = there_NM + self.cost_EB[experts_N][:, seats_M]
        worst_NM = np.maximum(here_NM, there_NM)
        grows_NM = self.bytes_E[experts_N][:, None] - self.bytes_E[others_M]
        room_M = np.minimum(arrays.memory_B, arrays.held_B)[seats_M]
        room = min(arrays.memory_B[slowest], arrays.held_B[slowest])
        worst_NM[(grows_NM > room_M) | (-grows_NM > room)] = np.inf
        row, column = divmod(int(np.argmin(worst_NM)), worst_NM.shape[1])
        if worst_NM[row, column] > busy * (1.0 - LEAST_GAIN):
            return False
        mine, other, seat = int(experts_N[row]), int(others_M[column]), int(seats_M[column])
        self._take(mine)
        self._take(other)
        self._put(mine, seat, True)
        self._put(other, slowest, True)
        return True

    def _pays(self, home_E: Ints, before: _Saved) -> bool:
        """Whether what moves from where it could have stayed is won back within the horizon."""
        is_moved_E = (home_E == before.seat_E) & (self.seat_E != before.seat_E)
        if not is_moved_E.any():
            return True
        moved = np.flatnonzero(is_moved_E).tolist()
        cost_s = sum(self.arrays.loading_s(int(self.bytes_E[e]), int(self.seat_E[e])) for e in moved)
        gained_s = float(before.busy_B.max()) - float(self.busy_B.max())
        return gained_s * self.trade.horizon_steps >= cost_s

    def _saved(self) -> _Saved:
        arrays = self.arrays
        return _Saved(
            self.seat_E.copy(),
            self.busy_B.copy(),
            self.count_B.copy(),
            self.in_memory_E.copy(),
            arrays.memory_B.copy(),
            arrays.held_B.copy(),
            self.quota_B.copy(),
        )

    def _restore(self, saved: _Saved) -> None:
        self.seat_E, self.busy_B, self.count_B, self.in_memory_E, *left = saved
        self.arrays.memory_B, self.arrays.held_B, self.quota_B = left
