"""What the signals of `router.snarc` remember: for each request and layer, the last positions' sketches.

A ring of WINDOW positions for each request. Position p of a request lies at p modulo WINDOW, so a request that is
computed again from its beginning finds what it wrote itself and nothing of before. Used on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.native_signals import past_signals
from router.snarc import (
    GAIN_POSITIONS,
    RECENT,
    WINDOW,
    Past,
    Sketch,
    arousal,
    novelty,
    reward,
    surprise,
)


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
    """Into the ring's rows, followed by the step's where some span has several rows."""
    recent_TR: Tensor
    """The RECENT nearest of these."""
    is_in_ring: bool
    """Whether all of the past is in the ring: every span has one row."""
    confidence_TL: Tensor
    """The same for confidences, of which only the prompt's are kept."""
    kept_rows: Tensor | None
    """None means all, as when each request has one row."""
    kept_at: Tensor
    kept_confidence_rows: Tensor
    kept_confidence_at: Tensor
    num_recent_T: Tensor
    num_T: Tensor
    settled: tuple[str, ...] | None
    """The rows' requests where all are beyond their prompts, so that their rewards do not change any more."""


@dataclass
class _Ring:
    """One layer's: (slots * WINDOW, ...) rows. Slot 0 belongs to nobody and stays zero."""

    direction_MS: Tensor
    length_M: Tensor
    confidence_M: Tensor
    settled: tuple[str, ...] | None = None
    reward_T: Tensor | None = None
    """Of the settled rows."""


class SignalMemory:
    """Rings of all layers. Slots grow by doubling and are used again."""

    def __init__(self, sketch: Sketch) -> None:
        self._sketch, self._sketch_width = sketch, sketch.signs_GS.shape[1]
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
            for ring in self._rings.values():
                if ring.settled is not None and request_id in ring.settled:
                    ring.settled = None

    def index(self, spans: Sequence[MemorySpan]) -> RecallIndex:
        """For a step's spans, in row order."""
        slots = [self._slot(span.request_id) for span in spans]
        names = tuple(span.request_id for span in spans for _ in range(span.count))
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
        past_TW = places.before(position_T, WINDOW)
        return RecallIndex(
            past_TW,
            past_TW[:, :RECENT].contiguous(),
            len(rows_T) == len(spans),
            confidence_TL,
            None if bool(is_kept_T.all()) else rows_T[is_kept_T],
            at_T[is_kept_T],
            rows_T[is_kept_prompt_T],
            at_T[is_kept_prompt_T],
            position_T.clamp(1, RECENT).float(),
            position_T.clamp(1, WINDOW).float(),
            names if bool((position_T >= prompt_T).all()) else None,
        )

    def follow(
        self,
        layer: int,
        index: RecallIndex,
        hidden_TD: Tensor,
        asked: tuple[bool, bool, bool],
        level: str | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Surprise, novelty and arousal of T rows against the positions before them, those that are asked for; then
        remembers the rows.

        asked: where arousal is not, nobody may ask for it later in these requests. level: of our own products, where
        the model is computed by them.
        """
        ring = self._ring(layer)
        has_surprise, has_novelty, has_arousal = asked
        back_TW = index.past_TW if has_novelty or has_arousal else index.recent_TR
        if level is not None:
            surprise_T, novelty_T, arousal_T = past_signals(
                level,
                hidden_TD,
                self._sketch.signs_GS,
                (ring.direction_MS, ring.length_M),
                back_TW,
                RECENT,
                (index.num_recent_T, index.num_T),
                (index.kept_rows, index.kept_at),
                asked,
            )
            return surprise_T, novelty_T, arousal_T
        direction_TS, length_T1 = self._sketch.of(hidden_TD)
        directions_TWS = _recalled(ring.direction_MS, direction_TS, back_TW, index)
        lengths_TW = None
        if has_arousal:
            lengths_TW = _recalled(ring.length_M, length_T1.squeeze(1), back_TW, index)
        past = Past(directions_TWS, lengths_TW, index.num_recent_T, index.num_T)
        return (
            surprise(direction_TS, past) if has_surprise else None,
            novelty(direction_TS, past) if has_novelty else None,
            arousal(length_T1, past) if has_arousal else None,
        )

    def settled_reward(self, layer: int, index: RecallIndex) -> Tensor | None:
        """The rewards of these rows, where they are all known from the step before."""
        ring = self._ring(layer)
        return ring.reward_T if index.settled is not None and index.settled == ring.settled else None

    def recall_reward(self, layer: int, index: RecallIndex, confidence_T: Tensor) -> Tensor:
        """(T,) rewards from the confidences of the prompt positions before; then remembers the rows of prompts."""
        ring = self._ring(layer)
        flat = index.confidence_TL.view(-1)
        before = torch.cat((ring.confidence_M, confidence_T)).index_select(0, flat)
        if len(index.kept_confidence_rows):
            kept = confidence_T.index_select(0, index.kept_confidence_rows)
            ring.confidence_M.index_copy_(0, index.kept_confidence_at, kept)
        ring.settled = index.settled
        ring.reward_T = reward(before.view(index.confidence_TL.shape))
        return ring.reward_T

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
            ring = _Ring(torch.zeros(num_rows, self._sketch_width), *torch.zeros(2, num_rows))
            self._rings[layer] = ring
        missing = num_rows - len(ring.confidence_M)
        if missing:
            ring.direction_MS = torch.cat((ring.direction_MS, torch.zeros(missing, self._sketch_width)))
            ring.length_M = torch.cat((ring.length_M, torch.zeros(missing)))
            ring.confidence_M = torch.cat((ring.confidence_M, torch.zeros(missing)))
        return ring


def _recalled(ring_M: Tensor, own_T: Tensor, back_TW: Tensor, index: RecallIndex) -> Tensor:
    """(T, W, ...) what lies at the places; then leaves the step's own rows in the ring."""
    source_M = ring_M if index.is_in_ring else torch.cat((ring_M, own_T))
    found_TW = source_M.index_select(0, back_TW.view(-1)).view(*back_TW.shape, *ring_M.shape[1:])
    kept = own_T if index.kept_rows is None else own_T.index_select(0, index.kept_rows)
    ring_M.index_copy_(0, index.kept_at, kept)
    return found_TW


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
