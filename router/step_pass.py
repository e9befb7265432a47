"""A pass of some sequences' rows through the model, from the plan's chunks to the rows' logits.

Made and driven by `router.engine`. The sequences may end while a pass pauses; the pass keeps the blocks that it still
writes to.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from router.backbone import Backbone, ForwardPass
from router.batcher import Chunk
from router.kv_cache import BlockAllocator
from router.logprobs import prompt_nlls
from router.prompt_inputs import NO_INPUTS, InputRows, rows_within
from router.sequence import Sequence
from router.step_batch import Span, StepBatch
from router.step_routing import PromptProbe, RoutingPolicy, RoutingWatcher, SpanOwner, StepRouting


class PassRows(NamedTuple):
    """One sequence's rows of a pass."""

    sequence: Sequence
    chunk: Chunk
    probed: tuple[int, ...]
    """Positions that the probe asks for."""

    @property
    def end(self) -> int:
        return self.chunk.first + self.chunk.count

    @property
    def is_last(self) -> bool:
        """Whether the rows reach the end of the known text, so that a token can be drawn."""
        return self.end == len(self.sequence.tokens)

    @property
    def unscored(self) -> range:
        return self.sequence.unscored(self.chunk.first, self.chunk.count)

    @property
    def owner(self) -> SpanOwner:
        return SpanOwner(self.sequence.request, self.chunk.first, self.chunk.count, self.sequence.tokens)


@dataclass
class StepPass:
    """Rows on their way."""

    rows: tuple[PassRows, ...]
    forward: ForwardPass
    is_mixed: bool = False
    """Whether experts of another numerics class computed some of it."""
    layer_s: float = 0.0
    """What the layer that is on its way has taken so far, pauses not counted."""
    overtaken_s: float = 0.0
    """What passes that overtook it have taken beyond what it has had since."""
    kept_tables: list[str] = field(default_factory=list)
    """Names under which blocks of sequences that have ended meanwhile are held to the pass's end."""

    @property
    def num_tokens(self) -> int:
        return self.forward.batch.num_tokens

    def has(self, sequence: Sequence) -> bool:
        return any(rows.sequence is sequence for rows in self.rows)


def begin_pass(
    backbone: Backbone,
    allocator: BlockAllocator,
    members: SequenceOf[tuple[Chunk, Sequence]],
    policy: RoutingPolicy,
    watchers: tuple[RoutingWatcher, ...],
    probe: PromptProbe | None,
) -> StepPass:
    """Nothing is computed yet but the embeddings."""
    rows = tuple(PassRows(sequence, chunk, _probed(probe, chunk, sequence)) for chunk, sequence in members)
    routing = StepRouting(tuple(part.owner for part in rows), policy, watchers)
    tables = [allocator.table(part.chunk.name) for part in rows]
    return StepPass(rows, backbone.begin(_batch(backbone, rows, tables, routing)))


def hand_out_captured(
    parts: SequenceOf[PassRows], captured: Mapping[int, Tensor], is_running: Callable[[Sequence], bool]
) -> None:
    """Give the hidden states that were asked for to those who asked. captured: of each layer, (T, D)."""
    row = 0
    for part in parts:
        inputs, chunk = part.sequence.inputs, part.chunk
        if inputs.on_capture is not None and is_running(part.sequence):
            for layer in inputs.capture_layers:
                inputs.on_capture(layer, chunk.first, captured[layer][row : row + chunk.count])
        row += chunk.count


def score_probed(
    parts: SequenceOf[PassRows], scored_RD: Tensor, probe: PromptProbe, logits: Callable[[Tensor], Tensor]
) -> None:
    """Tell a probe what it asked for. Its rows come after all others: it changes nothing of anybody's answer."""
    following = [part.sequence.tokens[p + 1] for part in parts for p in part.probed]
    if following:
        probe.scored(following, prompt_nlls(scored_RD[-len(following) :], following, logits))


def _probed(probe: PromptProbe | None, chunk: Chunk, sequence: Sequence) -> tuple[int, ...]:
    if probe is None:
        return ()
    return tuple(probe.positions(SpanOwner(sequence.request, chunk.first, chunk.count)))


def _batch(
    backbone: Backbone,
    rows: SequenceOf[PassRows],
    tables: SequenceOf[tuple[int, ...]],
    routing: StepRouting,
) -> StepBatch:
    spans, lengths = [], []
    ids = array("q")
    logit_rows: list[int] = []
    scored_rows: list[int] = []
    probed_rows: list[int] = []
    embeddings: list[InputRows] = []
    injections: dict[int, tuple[InputRows, ...]] = {}
    capture_layers: set[int] = set()
    for part, table in zip(rows, tables, strict=True):
        sequence, first, count = part.sequence, part.chunk.first, part.chunk.count
        end, shift = first + count, len(ids) - first
        spans.append(Span(table, first, count))
        ids.extend(sequence.tokens[first:end])
        if backbone.config.rope.depends_on_length:
            lengths.append(sequence.text_lengths(first, count))
        if sequence.wants_prompt_logprobs:
            scored_rows.extend(shift + position for position in part.unscored)
        if part.probed:
            probed_rows.extend(shift + position for position in part.probed)
        if sequence.inputs is not NO_INPUTS:
            capture_layers.update(sequence.inputs.capture_layers)
            embeddings += rows_within(sequence.inputs.embeddings, first, end, shift)
            for layer, added in sequence.inputs.injections.items():
                if runs := tuple(rows_within(added, first, end, shift)):
                    injections[layer] = injections.get(layer, ()) + runs
        if end == len(sequence.tokens):
            logit_rows.append(len(ids) - 1)
    return StepBatch(
        tuple(spans),
        torch.frombuffer(ids, dtype=torch.int64),
        _positions(rows),
        tuple(logit_rows),
        tuple(embeddings),
        injections,
        tuple(sorted(capture_layers)),
        rows[0].chunk.name[:64],
        torch.cat(lengths) if lengths else None,
        (*scored_rows, *probed_rows),
        routing,
    )


def _positions(rows: SequenceOf[PassRows]) -> Tensor:
    """(3, T) rotary positions; one row three times where no row has others."""
    if all(part.sequence.inputs.positions_3P is None for part in rows):
        positions = array("q")
        for part in rows:
            first, count = part.chunk.first, part.chunk.count
            positions.extend((first,) if count == 1 else range(first, first + count))
        return torch.frombuffer(positions, dtype=torch.int64).expand(3, -1)
    parts = [part.sequence.positions(part.chunk.first, part.chunk.count) for part in rows]
    if all(part_3T.stride(0) == 0 for part_3T in parts):
        return torch.cat([part_3T[0] for part_3T in parts]).expand(3, -1)
    return torch.cat(parts, dim=1)
