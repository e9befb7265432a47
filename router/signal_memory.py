"""What the signals of `router.snarc` remember: for each request and layer, the last positions' sketches.

A ring of WINDOW positions for each request. Position p of a request lies at p modulo WINDOW, so a request that is
computed again from its beginning finds what it wrote itself and nothing of before. Used on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.snarc import GAIN_POSITIONS, RECENT, WINDOW, Past


@dataclass(frozen=True)
class MemorySpan:
    """Consecutive rows of one request in a step."""

    request_id: str
    num_prompt: int
    first: int
    """Position of the first row."""
    count: int


@dataclass(frozen=True)
class RecallIndex:
    """Where the T rows of a step find and leave their memories; the same for every layer."""

    past_TW: Tensor
    """Into the ring's rows followed by the step's."""
    confidence_TL: Tensor
    """The same for confidences, of which only the prompt's are kept."""
    kept_rows: Tensor
    kept_at: Tensor
    kept_confidence_rows: Tensor
    kept_confidence_at: Tensor
    num_recent_T: Tensor
    num_T: Tensor


@dataclass
class _Ring:
    """One layer's: (slots * WINDOW, ...) rows. Slot 0 belongs to nobody and stays zero."""

    directions_MS: Tensor
    lengths_M: Tensor
    confidence_M: Tensor


class SignalMemory:
    """Rings of all layers. Slots grow by doubling and are used again."""

    def __init__(self, sketch_width: int) -> None:
        self._sketch_width = sketch_width
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._num_slots = 1
        self._rings: dict[int, _Ring] = {}

    @property
    def num_requests(self) -> int:
        return len(self._slots)

    def forget(self, request_id: str) -> None:
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def index(self, spans: Sequence[MemorySpan]) -> RecallIndex:
        """For a step's spans, in row order."""
        slots = [self._slot(span.request_id) for span in spans]
        counts = torch.tensor([span.count for span in spans])
        facts = torch.tensor(
            [(slot, span.first, span.num_prompt) for slot, span in zip(slots, spans, strict=True)]
        )
        slot_T, first_T, prompt_T = facts.repeat_interleave(counts, dim=0).unbind(1)
        start_T = (counts.cumsum(0) - counts).repeat_interleave(counts)
        rows_T = torch.arange(len(start_T))
        position_T = first_T + rows_T - start_T
        places = _Places(slot_T, first_T, start_T, self._num_slots * WINDOW)
        of_prompt_T = torch.minimum(position_T, prompt_T)
        confidence_TL = places.before(of_prompt_T, 2 * GAIN_POSITIONS)
        confidence_TL[of_prompt_T < 2 * GAIN_POSITIONS] = 0
        end_T = first_T + counts.repeat_interleave(counts)
        is_kept_T = position_T >= end_T - WINDOW
        is_kept_prompt_T = (position_T < prompt_T) & (position_T >= torch.minimum(end_T, prompt_T) - WINDOW)
        at_T = slot_T * WINDOW + position_T % WINDOW
        return RecallIndex(
            places.before(position_T, WINDOW),
            confidence_TL,
            rows_T[is_kept_T],
            at_T[is_kept_T],
            rows_T[is_kept_prompt_T],
            at_T[is_kept_prompt_T],
            position_T.clamp(1, RECENT).float(),
            position_T.clamp(1, WINDOW).float(),
        )

    def recall(self, layer: int, index: RecallIndex, direction_TS: Tensor, length_T: Tensor) -> Past:
        """What each row remembers; then remembers the rows."""
        ring = self._ring(layer)
        num_rows, num_back = index.past_TW.shape
        flat = index.past_TW.view(-1)
        directions = torch.cat((ring.directions_MS, direction_TS)).index_select(0, flat)
        lengths = torch.cat((ring.lengths_M, length_T)).index_select(0, flat)
        ring.directions_MS[index.kept_at] = direction_TS[index.kept_rows]
        ring.lengths_M[index.kept_at] = length_T[index.kept_rows]
        return Past(
            directions.view(num_rows, num_back, -1),
            lengths.view(num_rows, num_back),
            index.num_recent_T,
            index.num_T,
        )

    def recall_confidence(self, layer: int, index: RecallIndex, confidence_T: Tensor) -> Tensor:
        """(T, L) confidences of the prompt positions before each row; then remembers the rows of prompts."""
        ring = self._ring(layer)
        before_TL = torch.cat((ring.confidence_M, confidence_T))[index.confidence_TL]
        if len(index.kept_confidence_rows):
            ring.confidence_M[index.kept_confidence_at] = confidence_T[index.kept_confidence_rows]
        return before_TL

    def _slot(self, request_id: str) -> int:
        slot = self._slots.get(request_id)
        if slot is None:
            if not self._free:
                self._free = list(range(self._num_slots * 2 - 1, self._num_slots - 1, -1))
                self._num_slots *= 2
            slot = self._slots[request_id] = self._free.pop()
        return slot

    def _ring(self, layer: int) -> _Ring:
        num_rows = self._num_slots * WINDOW
        ring = self._rings.get(layer)
        if ring is None:
            zeros = torch.zeros(num_rows)
            ring = _Ring(torch.zeros(num_rows, self._sketch_width), zeros, zeros.clone())
            self._rings[layer] = ring
        missing = num_rows - len(ring.lengths_M)
        if missing:
            zeros = torch.zeros(missing)
            ring.directions_MS = torch.cat(
                (ring.directions_MS, zeros.unsqueeze(-1).expand(-1, self._sketch_width))
            )
            ring.lengths_M = torch.cat((ring.lengths_M, zeros))
            ring.confidence_M = torch.cat((ring.confidence_M, zeros))
        return ring


@dataclass(frozen=True)
class _Places:
    """Of T rows: their slots, the first position of their spans, the span's first row, and the rows of a ring."""

    slot_T: Tensor
    first_T: Tensor
    start_T: Tensor
    num_ring_rows: int

    def before(self, position_T: Tensor, num_back: int) -> Tensor:
        """(T, num_back) indices of the positions before, nearest first: in the ring, or after it among the step's
        own rows. Before the beginning there is row 0, which is zero."""
        back_TW = position_T.unsqueeze(-1) - torch.arange(1, num_back + 1)
        in_ring = self.slot_T.unsqueeze(-1) * WINDOW + back_TW % WINDOW
        in_step = self.num_ring_rows + self.start_T.unsqueeze(-1) + back_TW - self.first_T.unsqueeze(-1)
        found = torch.where(back_TW >= self.first_T.unsqueeze(-1), in_step, in_ring)
        return torch.where(back_TW < 0, 0, found)
