"""What one step computes: rows of sequences, where their keys go, and how their attention is grouped.

Plain data made by `router.engine` for `router.backbone`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from experts.devices import CPU, upload
from router.attention import BLOCK_POSITIONS
from router.kv_cache import blocks_for
from router.prompt_inputs import InputRows
from router.step_routing import NATIVE, StepRouting

Half = Literal["attention", "experts"]
"""Of a layer. A dense layer's second half counts as `experts`."""


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one sequence in a step."""

    table: tuple[int, ...]
    """The sequence's KV blocks."""
    first: int
    """Cache position of the first row."""
    count: int


@dataclass(frozen=True)
class StepBatch:
    """T token rows of one step, span after span."""

    spans: tuple[Span, ...]
    token_ids_T: Tensor
    """int64; ignored where `embeddings` has a row."""
    positions_3T: Tensor
    """int64 rotary positions: time, height, width."""
    logit_rows: tuple[int, ...]
    """Rows whose next-token logits are wanted."""
    embeddings: tuple[InputRows, ...] = ()
    """Inputs of some rows in place of their tokens' embeddings."""
    injections: Mapping[int, tuple[InputRows, ...]] = field(default_factory=dict)
    """Layer -> what is added to some rows' hidden states after that layer. Only of layers that have such rows."""
    capture_layers: tuple[int, ...] = ()
    """Layers whose output hidden states, before any injection, are handed out."""
    trace: str = ""
    lengths_T: Tensor | None = None
    """int64, for each row the longer of its sequence's prompt and the text up to it; see `RopeConfig`."""
    scored_rows: tuple[int, ...] = ()
    """Rows whose final hidden state is handed out, for logits of prompt positions."""
    routing: StepRouting = NATIVE

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]


@dataclass(frozen=True)
class StepOutput:
    logits_LV: Tensor
    """Float32, one row per entry of `logit_rows`."""
    captured: dict[int, Tensor]
    """Layer -> (T, D)."""
    phase_seconds: dict[str, float]
    """Wall time by phase: attention, experts, head."""
    scored_RD: Tensor
    """Hidden states before the last norm, one row per entry of `scored_rows`, for `Backbone.logits`."""
    best_L: list[int] = field(default_factory=list)
    """The likeliest token of each row of `logits_LV`, of equal ones the first; -1 where a logit is not finite."""


@dataclass(frozen=True)
class AttentionGroup:
    """Spans of equal count whose attention is computed in one call."""

    rows: Tensor
    """Row numbers in the batch, span after span."""
    count: int
    tables_SN: Tensor
    limits_SC: Tensor
    """How many cache positions each row sees."""

    def on(self, device: torch.device) -> AttentionGroup:
        tensors = (upload(tensor, device) for tensor in (self.rows, self.tables_SN, self.limits_SC))
        rows, tables_SN, limits_SC = tensors
        return AttentionGroup(rows, self.count, tables_SN, limits_SC)


class CacheSlots:
    """Where a step's rows are written, and how its spans are grouped; the same for every layer."""

    def __init__(self, spans: Sequence[Span], device: torch.device = CPU) -> None:
        positions = [span.first + i for span in spans for i in range(span.count)]
        tables = [span.table for span in spans for _ in range(span.count)]
        blocks = [table[p // BLOCK_POSITIONS] for p, table in zip(positions, tables, strict=True)]
        self.blocks_T = upload(torch.tensor(blocks), device)
        self.offsets_T = upload(torch.tensor(positions) % BLOCK_POSITIONS, device)
        members: dict[tuple[int, int], list[tuple[int, Span]]] = {}
        row = 0
        for span in spans:
            # Lengths within a factor of two share a call; padding to the longest changes no bit.
            bucket = blocks_for(span.first + span.count).bit_length()
            key = (1, bucket) if span.count == 1 else (span.count, row + 2)
            members.setdefault(key, []).append((row, span))
            row += span.count
        self.groups = [_group(rows_and_spans).on(device) for rows_and_spans in members.values()]


def _group(rows_and_spans: list[tuple[int, Span]]) -> AttentionGroup:
    count = rows_and_spans[0][1].count
    num_blocks = max(blocks_for(span.first + count) for _, span in rows_and_spans)
    tables = [
        (list(span.table[: blocks_for(span.first + count)]) + [0] * num_blocks)[:num_blocks]
        for _, span in rows_and_spans
    ]
    rows = [row + i for row, _ in rows_and_spans for i in range(count)]
    limits = [[span.first + i + 1 for i in range(count)] for _, span in rows_and_spans]
    return AttentionGroup(torch.tensor(rows), count, torch.tensor(tables), torch.tensor(limits))
