"""What the next step computes: a pure decision from facts. Called by `router.engine` before every step.

Running sequences go first, oldest first: those that need one token, then chunks of prompts under a token budget.
When KV blocks run out, the youngest running sequence is preempted. Waiting sequences are admitted in order of
arrival, preempted ones before new ones, while blocks for their prompt and a reserve are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.kv_cache import blocks_for


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of one step and of the engine."""

    max_batch_tokens: int = 512
    """Token rows in a step. Also the longest chunk of a prompt."""
    max_running: int = 64
    max_waiting: int = 256
    """Open requests beyond `max_running`; one more is refused."""
    admission_reserve: int = 256
    """Positions beyond its known tokens for which a sequence must find blocks when it is admitted."""

    @property
    def max_open(self) -> int:
        return self.max_running + self.max_waiting


@dataclass(frozen=True)
class SequenceFacts:
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


def admission_positions(facts: SequenceFacts, reserve: int) -> int:
    """Positions for which blocks are allocated when a sequence is admitted."""
    return min(facts.num_tokens + reserve, facts.max_total)


def plan_step(
    running: Sequence[SequenceFacts], waiting: Sequence[SequenceFacts], num_free: int, limits: BatchLimits
) -> StepPlan:
    """Decide one step. running and waiting: oldest first. num_free: KV blocks that nobody holds."""
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
    chunks = _share_out([*kept, *admitted], limits.max_batch_tokens)
    return StepPlan(
        tuple(facts.name for facts in preempted), tuple(facts.name for facts in admitted), tuple(chunks)
    )


def _preempt(
    running: Sequence[SequenceFacts], num_free: int
) -> tuple[list[SequenceFacts], list[SequenceFacts], int]:
    """Drop the youngest until the others can grow. Returns (kept, preempted, blocks left after growth)."""
    kept = list(running)
    preempted: list[SequenceFacts] = []
    while True:
        growth = sum(max(0, blocks_for(facts.num_tokens) - facts.num_blocks) for facts in kept)
        if growth <= num_free or len(kept) <= 1:
            return kept, preempted, num_free - growth
        youngest = kept.pop()
        num_free += youngest.num_blocks - youngest.num_shared_blocks
        preempted.append(youngest)


def _share_out(sequences: Sequence[SequenceFacts], budget: int) -> list[Chunk]:
    """Single tokens first, so that running streams never wait behind a prompt; then prompts, oldest first."""
    chunks = []
    for facts in sorted(sequences, key=lambda facts: facts.num_missing > 1):
        count = min(facts.num_missing, budget)
        if count > 0:
            chunks.append(Chunk(facts.name, facts.num_computed, count))
            budget -= count
    return chunks
