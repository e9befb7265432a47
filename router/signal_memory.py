"""What the signals of `router.snarc` remember: for each request and layer, the last positions' sketches.

A ring of WINDOW positions for each request. Position p of a request lies at p modulo WINDOW, so a request that is
computed again from its beginning finds what it wrote itself and nothing of before. Used on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

    num_ring_rows: int
    """As the numbers count them: the rings may have grown since."""
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
    kept: Memories
    """Of the rows that are kept, layer by layer; in the rings from the step's end on."""
    slots: tuple[tuple[str, Slot], ...]
    """Of the step's requests."""


class Slot(NamedTuple):
    """A request's part of the rings."""

    place: int
    number: int
    """Of all that were ever given: a place, and a request's name, may come again."""


class Memories(NamedTuple):
    """Of N layers, float32."""

    direction_NMS: Tensor
    length_NM: Tensor
    confidence_NM: Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_rows: int, width: int, num_confidences: int) -> Memories:
        sizes = (num_rows, width), (num_rows,), (num_confidences,)
        return cls(*(torch.zeros(num_layers, *size) for size in sizes))

    def longer(self, num_rows: int) -> Memories:
        """With zeros behind."""
        grown = Memories.zeros(len(self.length_NM), num_rows, self.direction_NMS.shape[2], num_rows)
        for new, old in zip(grown, self, strict=True):
            new[:, : old.shape[1]] = old
        return grown


class SignalMemory:
    """Rings of all layers. Slots grow by doubling and are used again; slot 0 belongs to nobody and stays zero.

    A step's rows are remembered when it has ended, all layers at once: other steps may come between its layers, and one
    that does not come to its end leaves nothing.
    """

    def __init__(self, sketch: Sketch, num_layers: int) -> None:
        """num_layers: those that signals are asked of, by their numbers from 0."""
        self._sketch, self._num_layers = sketch, num_layers
        self._slots: dict[str, Slot] = {}
        self._num_given = 0
        self._free: list[int] = []
        self._num_slots = 1
        self._rings = Memories.zeros(num_layers, WINDOW, sketch.width, WINDOW)
        self._settled: list[tuple[tuple[str, ...], Tensor] | None] = [None] * num_layers
        """By layer, the rows' requests of the last step beyond all prompts, and their rewards."""

    @property
    def num_requests(self) -> int:
        return len(self._slots)

    def forget(self, request_id: str) -> None:
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot.place)
            self._settled = [
                known if known and request_id not in known[0] else None for known in self._settled
            ]

    def index(self, spans: Sequence[MemorySpan]) -> RecallIndex:
        """For a step's spans, in row order."""
        slots = [self._slot(span.request_id) for span in spans]
        names = tuple(span.request_id for span in spans for _ in range(span.count))
        counts = torch.tensor([span.count for span in spans])
        facts = torch.tensor(
            [(slot.place, span.first, span.num_prompt) for slot, span in zip(slots, spans, strict=True)]
        )
        slot_T, first_T, prompt_T = facts.repeat_interleave(counts, dim=0).unbind(1)
        start_T = (counts.cumsum(0) - counts).repeat_interleave(counts)
        rows_T = torch.arange(len(start_T))
        position_T = first_T + rows_T - start_T
        num_ring_rows = self._num_slots * WINDOW
        places = _Places(slot_T, first_T, start_T, num_ring_rows)
        of_prompt_T = torch.minimum(position_T, prompt_T)
        confidence_TL = places.before(of_prompt_T, 2 * GAIN_POSITIONS)
        confidence_TL[of_prompt_T < 2 * GAIN_POSITIONS] = 0
        end_T = first_T + counts.repeat_interleave(counts)
        is_kept_T = position_T >= end_T - WINDOW
        is_kept_prompt_T = (position_T < prompt_T) & (position_T >= torch.minimum(end_T, prompt_T) - WINDOW)
        at_T = slot_T * WINDOW + position_T % WINDOW
        past_TW = places.before(position_T, WINDOW)
        kept_at, kept_confidence_at = at_T[is_kept_T], at_T[is_kept_prompt_T]
        return RecallIndex(
            num_ring_rows,
            past_TW,
            past_TW[:, :RECENT].contiguous(),
            len(rows_T) == len(spans),
            confidence_TL,
            None if bool(is_kept_T.all()) else rows_T[is_kept_T],
            kept_at,
            rows_T[is_kept_prompt_T],
            kept_confidence_at,
            position_T.clamp(1, RECENT).float(),
            position_T.clamp(1, WINDOW).float(),
            names if bool((position_T >= prompt_T).all()) else None,
            Memories.zeros(self._num_layers, len(kept_at), self._sketch.width, len(kept_confidence_at)),
            tuple((span.request_id, slot) for span, slot in zip(spans, slots, strict=True)),
        )

    def follow(
        self,
        layer: int,
        index: RecallIndex,
        hidden_TD: Tensor,
        asked: tuple[bool, bool, bool],
        level: str | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Surprise, novelty and arousal of T rows against the positions before them, those that are asked for.

        asked: where arousal is not, nobody may ask for it later in these requests. level: of our own products, where
        the model is computed by them.
        """
        ring, kept = self._rings, index.kept
        has_surprise, has_novelty, has_arousal = asked
        back_TW = index.past_TW if has_novelty or has_arousal else index.recent_TR
        known_MS, known_M = ring.direction_NMS[layer], ring.length_NM[layer]
        if level is not None:
            surprise_T, novelty_T, arousal_T = past_signals(
                level,
                hidden_TD,
                self._sketch.signs_GS,
                (known_MS[: index.num_ring_rows], known_M[: index.num_ring_rows]),
                back_TW,
                RECENT,
                (index.num_recent_T, index.num_T),
                (index.kept_rows, kept.direction_NMS[layer], kept.length_NM[layer]),
                asked,
            )
            return surprise_T, novelty_T, arousal_T
        direction_TS, length_T1 = self._sketch.of(hidden_TD)
        rows = slice(None) if index.kept_rows is None else index.kept_rows
        kept.direction_NMS[layer], kept.length_NM[layer] = direction_TS[rows], length_T1[rows, 0]
        past = Past(
            _recalled(known_MS, direction_TS, back_TW, index),
            _recalled(known_M, length_T1.squeeze(1), back_TW, index) if has_arousal else None,
            index.num_recent_T,
            index.num_T,
        )
        return (
            surprise(direction_TS, past) if has_surprise else None,
            novelty(direction_TS, past) if has_novelty else None,
            arousal(length_T1, past) if has_arousal else None,
        )

    def settled_reward(self, layer: int, index: RecallIndex) -> Tensor | None:
        """The rewards of these rows, where they are all known from the step before."""
        known = self._settled[layer]
        return known[1] if known is not None and index.settled == known[0] else None

    def recall_reward(self, layer: int, index: RecallIndex, confidence_T: Tensor) -> Tensor:
        """(T,) rewards from the confidences of the prompt positions before."""
        index.kept.confidence_NM[layer] = confidence_T[index.kept_confidence_rows]
        before_TL = _recalled(
            self._rings.confidence_NM[layer], confidence_T, index.confidence_TL, index, has_own=True
        )
        reward_T = reward(before_TL)
        self._settled[layer] = None if index.settled is None else (index.settled, reward_T)
        return reward_T

    def keep(self, index: RecallIndex) -> None:
        """At a step's end, when all layers are computed: the rows of requests that have not ended meanwhile."""
        places = index.kept_at, index.kept_at, index.kept_confidence_at
        left = [slot.place for name, slot in index.slots if self._slots.get(name) != slot]
        for ring_NM, kept_NK, at_K in zip(self._rings, index.kept, places, strict=True):
            if left:
                stays_K = ~torch.isin(at_K // WINDOW, torch.tensor(left))
                kept_NK, at_K = kept_NK[:, stays_K], at_K[stays_K]
            if len(at_K):
                ring_NM.index_copy_(1, at_K, kept_NK)

    def _slot(self, request_id: str) -> Slot:
        slot = self._slots.get(request_id)
        if slot is None:
            if not self._free:
                self._free = list(range(self._num_slots * 2 - 1, self._num_slots - 1, -1))
                self._num_slots *= 2
                self._rings = self._rings.longer(self._num_slots * WINDOW)
            self._num_given += 1
            slot = self._slots[request_id] = Slot(self._free.pop(), self._num_given)
        return slot


def _recalled(
    ring_M: Tensor, own_T: Tensor, back_TW: Tensor, index: RecallIndex, *, has_own: bool = False
) -> Tensor:
    """(T, W, ...) what lies at the places. has_own: some may be among the step's own rows whatever its spans."""
    ring_M = ring_M[: index.num_ring_rows]
    source_M = ring_M if index.is_in_ring and not has_own else torch.cat((ring_M, own_T))
    return source_M.index_select(0, back_TW.view(-1)).view(*back_TW.shape, *ring_M.shape[1:])


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
