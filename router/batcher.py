"""What the next step computes: a pure decision from facts. Called by `router.engine` before every step.

Sequences that need one token are computed at once. Prompts go beside them in a pass that pauses (`router.pace`), and
short ones that come while it is on its way overtake it in a pass of their own. When KV blocks run out, the youngest
running sequence is preempted. Waiting sequences are admitted in order of arrival, preempted ones before new ones, while
blocks for their prompt and a reserve are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from router.attention import BLOCK_POSITIONS
from router.kv_cache import blocks_for


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of one step and of the engine."""

    max_batch_tokens: int = 2048
    """Token rows in a step. Also the longest chunk of a prompt: each reads the weights of nearly all experts, from the
    disk where the memory does not hold them, so that few long ones are cheap."""
    max_running: int = 64
    max_waiting: int = 256
    """Open requests beyond `max_running`; one more is refused."""
    admission_reserve: int = 256
    """Positions beyond its known tokens for which a sequence must find blocks when it is admitted."""

    is_paced: bool = True
    """Whether prompts let running streams and short prompts go on (`router.pace`); without, work is done in the
    shortest time."""

    def with_most_rows(self, most: int | None) -> BatchLimits:
        """The same with no more rows in a step; None is no bound."""
        return self if most is None else replace(self, max_batch_tokens=min(self.max_batch_tokens, most))

    @property
    def max_open(self) -> int:
        return self.max_running + self.max_waiting


class SequenceFacts(NamedTuple):
    """What the batcher knows of a sequence."""

    name: str
    num_tokens: int
    """Known tokens: the prompt and what was generated."""
    num_computed: int
    """Positions whose keys and values are in the cache, or will be once it is admitted."""
    num_blocks: int
    """KV blocks it holds; 0 while it waits."""
    max_total: int
    """Tokens it may reach."""
    num_shared_blocks: int = 0
    """Blocks that others hold as well: of those it has while it runs, of those it would get while it waits."""
    is_in_pass: bool = False
    """Whether rows of it are in a pass that pauses at the moment."""

    @property
    def num_missing(self) -> int:
        return self.num_tokens - self.num_computed


@dataclass(frozen=True)
class Chunk:
    """Rows that one sequence contributes to the step."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class StepPlan:
    """Carry out in this order: preempt, admit, then grow and compute the chunks."""

    preempt: tuple[str, ...]
    admit: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    """Through all layers at once."""
    paused: tuple[Chunk, ...] = ()
    """In a new pass that pauses."""


def admission_positions(facts: SequenceFacts, reserve: int) -> int:
    """Positions for which blocks are allocated when a sequence is admitted."""
    return min(facts.num_tokens + reserve, facts.max_total)


def plan_step(
    running: Sequence[SequenceFacts],
    waiting: Iterable[SequenceFacts],
    num_free: int,
    limits: BatchLimits,
    most_paused: int | None = None,
) -> StepPlan:
    """Decide one step.

    running and waiting: oldest first; of those that wait none is asked for behind the first that does not fit.
    num_free: KV blocks that nobody holds. most_paused: rows of prompts in a new pass that pauses, beside running
    streams or a pass that is on its way, which it overtakes; None where no pass pauses.
    """
    kept, preempted, num_free = _preempt(running, num_free)
    admitted: list[SequenceFacts] = []
    if not preempted:
        for facts in waiting:
            needed = blocks_for(admission_positions(facts, limits.admission_reserve))
            needed -= facts.num_shared_blocks
            if len(kept) + len(admitted) >= limits.max_running or needed > num_free:
                break
            num_free -= needed
            admitted.append(facts)
    chunks, paused = _share_out([*kept, *admitted], limits.max_batch_tokens, most_paused)
    return StepPlan(
        tuple(facts.name for facts in preempted),
        tuple(facts.name for facts in admitted),
        tuple(chunks),
        tuple(paused),
    )


def _preempt(
    running: Sequence[SequenceFacts], num_free: int
) -> tuple[list[SequenceFacts], list[SequenceFacts], int]:
    """Drop the youngest until the others can grow. Returns (kept, preempted, blocks left after growth)."""
    kept = list(running)
    preempted: list[SequenceFacts] = []
    while True:
        growth = sum(
            blocks_for(facts.num_tokens) - facts.num_blocks
            for facts in kept
            if facts.num_tokens > facts.num_blocks * BLOCK_POSITIONS
        )
        if growth <= num_free or len(kept) <= 1:
            return kept, preempted, num_free - growth
        youngest = kept.pop()
        num_free += youngest.num_blocks - youngest.num_shared_blocks
        preempted.append(youngest)


def _share_out(
    sequences: Sequence[SequenceFacts], most: int, most_paused: int | None
) -> tuple[list[Chunk], list[Chunk]]:
    """Returns (rows computed at once, rows of a new pass that pauses), at most `most` each."""
    streams: list[Chunk] = []
    prompts: list[SequenceFacts] = []
    for facts in sequences:
        num_missing = 0 if facts.is_in_pass else facts.num_missing
        if num_missing == 1:
            streams.append(Chunk(facts.name, facts.num_computed, 1))
        elif num_missing:
            prompts.append(facts)
    del streams[most:]
    if most_paused is None:
        return [*streams, *_share_prompts(prompts, most - len(streams))], []
    if any(facts.is_in_pass for facts in sequences):
        return streams, _take_shortest(prompts, min(most, most_paused))
    return streams, _share_prompts(prompts, min(most, most_paused) if streams else most)


def _take_shortest(prompts: Sequence[SequenceFacts], budget: int) -> list[Chunk]:
    """Whole prompts: a part of one would overtake for nothing."""
    chunks = []
    for facts in sorted(prompts, key=lambda facts: facts.num_missing):
        budget -= facts.num_missing
        if budget < 0:
            break
        chunks.append(_chunk(facts, facts.num_missing))
    return chunks


def _share_prompts(prompts: Sequence[SequenceFacts], budget: int) -> list[Chunk]:
    """The oldest has half of the rows, if it needs them, and what the others leave; of these the shortest go first,
    so that a short prompt does not wait for a long one."""
    if not prompts or budget <= 0:
        return []
    oldest, others = prompts[0], sorted(prompts[1:], key=lambda facts: facts.num_missing)
    left_by_others = budget - sum(facts.num_missing for facts in others)
    chunks = [_chunk(oldest, max(-(-budget // 2), left_by_others))]
    budget -= chunks[0].count
    for facts in others:
        if budget > 0:
            chunks.append(_chunk(facts, budget))
            budget -= chunks[-1].count
    return chunks


def _chunk(facts: SequenceFacts, most: int) -> Chunk:
    return Chunk(facts.name, facts.num_computed, min(facts.num_missing, most))
