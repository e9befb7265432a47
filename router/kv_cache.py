"""The KV cache: which blocks a sequence holds (`BlockAllocator`, books only) and their bytes (`KvPool`).

Memory is handed out in blocks of `attention.BLOCK_POSITIONS` positions, all layers at once. Block 0 is never
handed out: it stays zero and pads the tables of shorter sequences. Called by `router.engine` (allocator, swap)
and `router.backbone` (reads and writes). Not safe for several threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.attention import BLOCK_POSITIONS
from router.errors import KvExhausted
from router.model_config import ModelConfig
from router.prefix_index import PrefixIndex


def blocks_for(num_positions: int) -> int:
    """How many blocks hold this many positions."""
    return -(-num_positions // BLOCK_POSITIONS)


@dataclass(frozen=True)
class BlockCopy:
    """A block whose content must be copied before the next write, because another sequence shares it."""

    source: int
    target: int


class BlockAllocator:
    """Block tables with reference counts. `allocate` pairs with `free`; `fork` and `share` share, a write unshares.

    Blocks that `prefixes` knows stay after their last holder until somebody needs room; they are free all the same.
    """

    def __init__(self, num_blocks: int) -> None:
        """num_blocks: with the zero block, so one more than can be handed out."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._holders = [0] * num_blocks
        self._tables: dict[str, list[int]] = {}
        self.prefixes = PrefixIndex()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + self.prefixes.num_kept

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def table(self, sequence: str) -> tuple[int, ...]:
        return tuple(self._tables[sequence])

    def num_blocks_of(self, sequence: str) -> int:
        return len(self._tables[sequence])

    def holds(self, sequence: str) -> bool:
        return sequence in self._tables

    def missing(self, sequence: str, num_positions: int) -> int:
        """Blocks that `extend` would take to cover this many positions."""
        return max(0, blocks_for(num_positions) - len(self._tables.get(sequence, ())))

    def allocate(self, sequence: str, num_positions: int) -> None:
        """Give a new sequence blocks for this many positions. Raises KvExhausted and then changes nothing."""
        assert sequence not in self._tables
        self._tables[sequence] = self._take(blocks_for(num_positions))

    def extend(self, sequence: str, num_positions: int) -> None:
        """Grow a sequence to cover this many positions. Raises KvExhausted and then changes nothing."""
        table = self._tables[sequence]
        if num_positions > len(table) * BLOCK_POSITIONS:
            table.extend(self._take(blocks_for(num_positions) - len(table)))

    def num_held(self, blocks: Sequence[int]) -> int:
        """How many of these blocks somebody holds, so that one more holder takes no room."""
        return sum(self._holders[block] > 0 for block in blocks)

    def share(self, sequence: str, blocks: Sequence[int]) -> None:
        """Give a new sequence blocks that `prefixes` knows."""
        assert sequence not in self._tables
        for block in blocks:
            if not self._holders[block]:
                self.prefixes.hold(block)
            self._holders[block] += 1
        self._tables[sequence] = list(blocks)

    def num_shared(self, sequence: str) -> int:
        """Blocks of a sequence that others hold as well."""
        return sum(self._holders[block] > 1 for block in self._tables[sequence])

    def fork(self, parent: str, child: str, num_positions: int | None = None) -> None:
        """Let a new sequence share the parent's blocks, or those of its first positions. Takes no memory until one
        of them writes."""
        assert child not in self._tables
        num_blocks = None if num_positions is None else blocks_for(num_positions)
        self._tables[child] = self._tables[parent][:num_blocks]
        for block in self._tables[child]:
            self._holders[block] += 1

    def unshare(self, sequence: str, first: int, last: int) -> list[BlockCopy]:
        """Make positions first..last-1 of a sequence its own. The caller copies, then writes.

        Raises KvExhausted and then changes nothing.
        """
        table = self._tables[sequence]
        shared = []
        for index in range(first // BLOCK_POSITIONS, blocks_for(last)):
            if self._holders[table[index]] > 1:
                shared.append(index)
            else:
                assert not self.prefixes.knows(table[index]), "a known block would be written to"
        if not shared:
            return []
        copies = []
        for index, target in zip(shared, self._take(len(shared)), strict=True):
            copies.append(BlockCopy(table[index], target))
            self._holders[table[index]] -= 1
            table[index] = target
        return copies

    def rename(self, sequence: str, name: str) -> None:
        """Its blocks are held under another name from now on."""
        assert name not in self._tables
        self._tables[name] = self._tables.pop(sequence)

    def free(self, sequence: str) -> tuple[int, ...]:
        """Give up a sequence's blocks. Returns those that nobody else holds and that are not kept for their prefix;
        they can be handed out again."""
        freed = []
        for block in reversed(self._tables.pop(sequence)):  # without what is before it, a block is of no use
            self._holders[block] -= 1
            if not self._holders[block] and not self.prefixes.release(block):
                freed.append(block)
        freed.reverse()
        self._free.extend(freed)
        return tuple(freed)

    def forget_prefixes(self) -> None:
        """Nobody is to find anything that is in the cache now."""
        self._free.extend(self.prefixes.clear())

    def check(self) -> None:
        """Raises AssertionError with the numbers when the books do not add up. For tests and debugging."""
        held = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table:
                held[block] += 1
        assert held == self._holders, f"holders {self._holders} but tables hold {held}"
        kept = [block for block in range(self.num_blocks) if self.prefixes.is_kept(block)]
        assert len(kept) == self.prefixes.num_kept, f"{self.prefixes.num_kept} kept, of ours {kept}"
        free = sorted([*self._free, *kept])
        assert free == [b for b in range(1, self.num_blocks) if not held[b]], (
            f"free {self._free}, kept {kept}"
        )
        self.prefixes.check()

    def _take(self, count: int) -> list[int]:
        if count > self.num_free:
            raise KvExhausted(count, self.num_free)
        taken = [self._free.pop() if self._free else self.prefixes.evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken


class KvPool:
    """Keys and values of all layers: (layers, blocks, kv_heads, BLOCK_POSITIONS, head_dim) each.

    Within a block and head, our own attention may keep elements in an order of its own; `write` and `gather` are for
    PyTorch's, and never meet it in one process.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        shape = (config.num_layers, num_blocks, config.num_kv_heads, BLOCK_POSITIONS, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        return config.kv_elements_per_position * BLOCK_POSITIONS * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(
        self, layer: int, blocks_T: Tensor, offsets_T: Tensor, keys_TKd: Tensor, values_TKd: Tensor
    ) -> None:
        """Store one row per token at (block, offset). Tensors are (T, kv_heads, head_dim) in the pool's dtype."""
        self.keys[layer][blocks_T, :, offsets_T] = keys_TKd
        self.values[layer][blocks_T, :, offsets_T] = values_TKd

    def gather(self, layer: int, tables_SN: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of S sequences as float32 (S * kv_heads, N, BLOCK_POSITIONS, head_dim)."""
        return self._gather(self.keys[layer], tables_SN), self._gather(self.values[layer], tables_SN)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            self.keys[:, copy.target] = self.keys[:, copy.source]
            self.values[:, copy.target] = self.values[:, copy.source]

    def swap_out(self, table: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A bit-exact copy of these blocks in host memory."""
        index = torch.tensor(table, device=self.keys.device)
        return self.keys.index_select(1, index).cpu(), self.values.index_select(1, index).cpu()

    def swap_in(self, table: Sequence[int], saved: tuple[Tensor, Tensor]) -> None:
        """Put saved blocks back, into as many blocks of the table as were saved."""
        keys, values = saved
        index = torch.tensor(table[: keys.shape[1]], device=self.keys.device)
        self.keys[:, index] = keys.to(self.keys.device)
        self.values[:, index] = values.to(self.values.device)

    def scrub(self, table: Sequence[int]) -> None:
        """Zero blocks that may hold non-finite numbers; a masked NaN would still poison whoever gets them next."""
        for block in table:
            self.keys[:, block] = 0
            self.values[:, block] = 0

    @staticmethod
    def _gather(pool_BKpd: Tensor, tables_SN: Tensor) -> Tensor:
        num_sequences, num_blocks = tables_SN.shape
        gathered = pool_BKpd[tables_SN.flatten()].float()
        gathered = gathered.view(num_sequences, num_blocks, *pool_BKpd.shape[1:]).transpose(1, 2)
        return gathered.flatten(0, 1)
