"""Room for sequences' keys and values: who gets blocks, shares them, is swapped out and gives them up.

Carries out what `router.batcher` plans; decides only what is shared. Blocks of a finished prefix can be found by later
sequences (`router.prefix_keys`); what they find has the bits that they would compute. Called by `router.engine`.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from torch import Tensor

from router.attention import BLOCK_POSITIONS
from router.batcher import SequenceFacts
from router.kv_cache import BlockAllocator, KvPool, blocks_for
from router.prefix_keys import PrefixScope, extend_keys
from router.prompt_groups import shared_positions
from router.sequence import Sequence


class KvRoom:
    """Pool, books and swapped-out blocks of one engine."""

    def __init__(self, pool: KvPool, swap_budget_bytes: int) -> None:
        self.pool = pool
        self.allocator = BlockAllocator(pool.keys.shape[1])
        self.scope: PrefixScope | None = None
        """Of plain requests that nobody owns; None means that no prefix is looked for or kept."""
        self.swapped_bytes = 0
        """Host memory that preempted sequences hold."""
        self.num_hit_positions = 0
        """Positions that sequences found computed, since the start."""
        self._swap_budget_bytes = swap_budget_bytes
        self._matched: dict[str, tuple[int, ...]] = {}

    @property
    def block_bytes(self) -> int:
        return self.pool.nbytes // self.allocator.num_blocks

    @property
    def prefix_bytes(self) -> int:
        """Of blocks that nobody holds and that are kept for their prefix."""
        return self.allocator.prefixes.num_kept * self.block_bytes

    def prefix_status(self) -> dict[str, int] | None:
        """Plain values for people; None where no prefix is kept."""
        if self.scope is None:
            return None
        return {
            "bytes": self.prefix_bytes,
            "hit_tokens": self.num_hit_positions,
            "evicted_blocks": self.allocator.prefixes.num_evicted,
        }

    def begin_step(self) -> None:
        """Matches hold until blocks change hands."""
        self._matched.clear()

    def facts_with_prefix(self, sequence: Sequence) -> SequenceFacts:
        """Of a waiting sequence, with what it would find. It is given that if it is admitted in this step."""
        blocks = self._match(sequence)
        if not blocks:
            return sequence.facts(0)
        self._matched[sequence.name] = blocks
        num_held = self.allocator.num_held(blocks)
        return sequence.facts(0, num_held, num_given=len(blocks) * BLOCK_POSITIONS)

    def take_matched(self, sequences: SequenceOf[Sequence]) -> None:
        """Hand the step's admitted sequences what they found, before anybody takes room."""
        for sequence in sequences:
            blocks = self._matched.get(sequence.name, ())
            if blocks:
                self.allocator.share(sequence.name, blocks)
                sequence.num_computed = len(blocks) * BLOCK_POSITIONS
                self.num_hit_positions += sequence.num_computed
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed if blocks else 0

    def admit(self, sequence: Sequence, num_positions: int) -> None:
        """Blocks for so many positions, beyond what it found; what was swapped out comes back."""
        name = sequence.name
        if self.allocator.holds(name):
            self.allocator.extend(name, num_positions)
        else:
            self.allocator.allocate(name, num_positions)
        if sequence.swapped is not None:
            self.pool.swap_in(self.allocator.table(name), sequence.swapped)
            self._forget_swapped(sequence)

    def fork(self, parent: Sequence, child: Sequence, num_positions: int) -> None:
        """Give a sequence its parent's prompt: full blocks are shared, one that will be written to is copied."""
        num_prompt = len(child.request.prompt_ids)
        self.allocator.fork(parent.name, child.name, num_prompt - 1)
        self.allocator.extend(child.name, num_positions)
        self.pool.copy(self.allocator.unshare(child.name, shared_positions(num_prompt), num_prompt))
        child.num_computed = num_prompt - 1
        child.is_mixed = parent.is_mixed

    def grow(self, name: str, first: int, end: int) -> None:
        """Let a sequence write positions first..end-1."""
        self.allocator.extend(name, end)
        if copies := self.allocator.unshare(name, first, end):
            self.pool.copy(copies)

    def swap_out(self, sequence: Sequence) -> None:
        """Take a sequence's blocks, bit for bit to host memory where that has room; else it is computed again."""
        table = self.allocator.table(sequence.name)[: blocks_for(sequence.num_computed)]
        if table and self.swapped_bytes + len(table) * self.block_bytes <= self._swap_budget_bytes:
            sequence.swapped = self.pool.swap_out(table)
            self.swapped_bytes += _nbytes(sequence.swapped)
            self.free(sequence, must_scrub=not sequence.has_drawn)
        else:
            self.free(sequence, must_scrub=not sequence.has_drawn)
            sequence.num_computed = 0

    def keep_prefix(self, sequence: Sequence) -> None:
        """Let others find the full blocks of what a sequence has computed. Only of one that has drawn a token from
        it: then its numbers are finite."""
        if not (self._is_shareable(sequence) and sequence.has_drawn and sequence.can_give_prefix):
            return
        if sequence.is_mixed:
            return
        num_blocks = sequence.num_computed // BLOCK_POSITIONS
        table, keys = self.allocator.table(sequence.name), self._keys(sequence, num_blocks)
        for key, block in zip(keys[:num_blocks], table, strict=False):
            self.allocator.prefixes.add(key, block)

    def free(self, sequence: Sequence, *, must_scrub: bool) -> None:
        """Give up a sequence's blocks. must_scrub: they may hold numbers that are not finite."""
        if not must_scrub:
            self.keep_prefix(sequence)
        freed = self.allocator.free(sequence.name)
        if must_scrub:
            self.pool.scrub(freed)

    def release(self, sequence: Sequence) -> None:
        """Give up all that an ended sequence holds."""
        if self.allocator.holds(sequence.name):
            self.free(sequence, must_scrub=not sequence.has_drawn)
        if sequence.swapped is not None:
            self._forget_swapped(sequence)

    def forget_prefixes(self, sequences: Iterable[Sequence]) -> None:
        """Something that was computed may be wrong: let nobody find it, nor what these sequences have."""
        self.allocator.forget_prefixes()
        for sequence in sequences:
            sequence.can_give_prefix = False

    def leave_to(self, name: str, sequence: Sequence) -> None:
        """Hold an ended sequence's blocks under another name, for a pass that still writes to them."""
        self.allocator.rename(sequence.name, name)

    def free_left(self, name: str) -> None:
        self.pool.scrub(self.allocator.free(name))

    def _match(self, sequence: Sequence) -> tuple[int, ...]:
        """Known blocks that its text begins with. Its last token is always computed, for its logits, and so are those
        whose hidden states somebody wants."""
        is_untouched = sequence.num_computed == 0 and sequence.swapped is None
        if not is_untouched or sequence.wants_prompt_logprobs or not self._is_shareable(sequence):
            return ()
        num_positions = shared_positions(len(sequence.tokens))
        if sequence.inputs.on_capture is not None:
            num_positions = min(num_positions, sequence.inputs.capture_from)
        num_blocks = num_positions // BLOCK_POSITIONS
        return self.allocator.prefixes.match(self._keys(sequence, num_blocks)[:num_blocks])

    def _is_shareable(self, sequence: Sequence) -> bool:
        return self.scope is not None and sequence.has_plain_prompt

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        assert self.scope is not None
        if len(sequence.block_keys) < num_blocks:
            root = replace(self.scope, owner=sequence.request.owner).root()
            media = sequence.inputs.media or ()
            extend_keys(sequence.block_keys, root, sequence.tokens, num_blocks, media)
        return sequence.block_keys

    def _forget_swapped(self, sequence: Sequence) -> None:
        assert sequence.swapped is not None
        self.swapped_bytes -= _nbytes(sequence.swapped)
        sequence.swapped = None


def _nbytes(saved: tuple[Tensor, Tensor]) -> int:
    return saved[0].nbytes + saved[1].nbytes
