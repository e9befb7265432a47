"""Which KV blocks hold which prefix, and which of them go first when room is needed: books only.

A block that is known and that nobody holds is kept until somebody needs room; the one that was used longest ago goes
first. Kept blocks count as free, so they take nothing from running requests. Called by `router.kv_cache`, which counts
holders.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """Keys of `router.prefix_keys` to blocks. A key has one block, a block at most one key."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Known blocks that nobody holds, the one used longest ago first."""
        self.num_evicted = 0

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def num_known(self) -> int:
        return len(self._block_of)

    def knows(self, block: int) -> bool:
        return block in self._key_of

    def is_kept(self, block: int) -> bool:
        return block in self._kept

    def match(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks of the first keys, up to the first that is not known."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return tuple(blocks)

    def add(self, key: bytes, block: int) -> None:
        """Make a block that somebody holds known. Changes nothing where the key or the block is known already."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def hold(self, block: int) -> None:
        """Somebody holds a kept block again."""
        del self._kept[block]

    def release(self, block: int) -> bool:
        """Nobody holds the block any more. Returns whether it is kept."""
        if block not in self._key_of:
            return False
        self._kept[block] = None
        return True

    def evict(self) -> int:
        """Forget the kept block that was used longest ago; it can be handed out. KeyError where none is kept."""
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        self.num_evicted += 1
        return block

    def clear(self) -> tuple[int, ...]:
        """Forget everything. Returns the blocks that were kept, which can be handed out."""
        kept = tuple(self._kept)
        self._kept.clear()
        self._block_of.clear()
        self._key_of.clear()
        return kept

    def check(self) -> None:
        """Raises AssertionError with the numbers when the books do not add up."""
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "keys and blocks differ"
        unknown = [block for block in self._kept if block not in self._key_of]
        assert not unknown, f"kept but not known: {unknown}"
