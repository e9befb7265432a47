"""The books of prefixes and blocks against a plain model, under any order of operations."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.attention import BLOCK_POSITIONS
from router.errors import KvExhausted
from router.kv_cache import BlockAllocator
from router.prefix_index import PrefixIndex
from router.prefix_keys import PrefixScope, extend_keys

NUM_BLOCKS = 13


class Books(RuleBasedStateMachine):
    """Sequences take, share, grow, keep and give up blocks. The model: what each holds, and when a key was released."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.texts: dict[str, list[bytes]] = {}
        """Of each sequence, the keys of its blocks."""
        self.known: dict[bytes, int] = {}
        self.kept: list[int] = []
        """Known blocks without holders, the one released first in front."""
        self.count = 0

    def _held(self) -> set[int]:
        return {block for name in self.texts for block in self.allocator.table(name)}

    def _take(self, count: int, found: Sequence[int] = ()) -> bool:
        """What the model loses when so many blocks are taken beside those found; False where there are not so many."""
        num_free = NUM_BLOCKS - 1 - len(self._held() | set(found))
        if count > num_free:
            return False
        num_evicted = max(0, count - (num_free - len(self.kept)))
        for block in self.kept[:num_evicted]:
            self.known = {key: value for key, value in self.known.items() if value != block}
        self.kept = self.kept[num_evicted:]
        return True

    @rule(text=st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=6))
    def admit(self, text: list[bytes]) -> None:
        """Find what is known of a text, take the rest."""
        keys = [b"".join(text[: i + 1]) for i in range(len(text))]
        found = []
        for key in keys:
            if key not in self.known:
                break
            found.append(self.known[key])
        assert self.allocator.prefixes.match(keys) == tuple(found)
        num_held = sum(block in self._held() for block in found)
        assert self.allocator.num_held(found) == num_held
        num_needed = len(keys) - num_held
        if num_needed > self.allocator.num_free:
            return
        name = f"s{self.count}"
        self.count += 1
        self.allocator.share(name, found)
        self.kept = [block for block in self.kept if block not in found]
        assert self._take(len(keys) - len(found), found)
        self.allocator.extend(name, len(keys) * BLOCK_POSITIONS)
        assert self.allocator.table(name)[: len(found)] == tuple(found)
        self.texts[name] = keys

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def make_known(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        for key, block in zip(self.texts[name], self.allocator.table(name), strict=True):
            self.allocator.prefixes.add(key, block)
            if key not in self.known and block not in self.known.values():
                self.known[key] = block

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        table = self.allocator.table(name)
        del self.texts[name]
        alone = [block for block in table if block not in self._held()]
        freed = self.allocator.free(name)
        assert freed == tuple(block for block in alone if block not in self.known.values())
        self.kept += [block for block in reversed(alone) if block in self.known.values()]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), blocks=st.integers(1, 3))
    def grow(self, data: st.DataObject, blocks: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        keys = self.texts[name]
        if not self._take(blocks):
            with pytest.raises(KvExhausted):
                self.allocator.extend(name, (len(keys) + blocks) * BLOCK_POSITIONS)
            return
        self.allocator.extend(name, (len(keys) + blocks) * BLOCK_POSITIONS)
        self.texts[name] = [*keys, *(f"{name}:{len(keys) + i}".encode() for i in range(blocks))]

    @rule()
    def forget(self) -> None:
        self.allocator.forget_prefixes()
        self.known, self.kept = {}, []

    @invariant()
    def books_add_up(self) -> None:
        self.allocator.check()
        held = self._held()
        assert self.allocator.num_used == len(held)
        assert self.allocator.num_free == NUM_BLOCKS - 1 - len(held)
        assert self.allocator.prefixes.num_kept == len(self.kept)
        assert self.allocator.prefixes.num_known == len(self.known)
        assert all(self.allocator.prefixes.match([key]) == (block,) for key, block in self.known.items())
        assert not held & set(self.kept)


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase


def test_longest_unused_goes_first_and_ends_before_beginnings() -> None:
    allocator = BlockAllocator(5)
    for name, keys in (("old", [b"1", b"12"]), ("new", [b"2", b"23"])):
        allocator.allocate(name, 2 * BLOCK_POSITIONS)
        for key, block in zip(keys, allocator.table(name), strict=True):
            allocator.prefixes.add(key, block)
    for name in ("old", "new"):
        allocator.free(name)
    assert allocator.num_free == 4, "what is kept takes no room from anybody"
    for taken, left in ((1, [b"1", b"2", b"23"]), (1, [b"2", b"23"]), (1, [b"2"]), (1, [])):
        allocator.allocate(f"taker{len(left)}", taken * BLOCK_POSITIONS)
        assert [key for key in (b"1", b"12", b"2", b"23") if allocator.prefixes.match([key])] == left
    assert allocator.prefixes.num_evicted == 4


def test_block_that_is_known_is_never_written_to() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate("a", BLOCK_POSITIONS)
    allocator.prefixes.add(b"k", allocator.table("a")[0])
    with pytest.raises(AssertionError, match="known block"):
        allocator.unshare("a", 3, 4)


def test_first_block_of_a_key_stays() -> None:
    index = PrefixIndex()
    index.add(b"k", 1)
    index.add(b"k", 2)
    index.add(b"l", 1)
    assert index.match([b"k"]) == (1,) and index.match([b"l"]) == ()
    assert not index.release(2) and index.release(1) and index.evict() == 1
    with pytest.raises(KeyError):
        index.evict()


SCOPE = PrefixScope("store", "class", 8)
TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=2 * BLOCK_POSITIONS, max_size=2 * BLOCK_POSITIONS)


@given(tokens=TOKENS, at=st.integers(0, 2 * BLOCK_POSITIONS - 1))
@settings(max_examples=30, deadline=None)
def test_key_covers_every_token_before_its_end(tokens: list[int], at: int) -> None:
    other = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    keys, other_keys = _keys(SCOPE, tokens), _keys(SCOPE, other)
    assert keys[1] != other_keys[1]
    assert (keys[0] == other_keys[0]) == (at >= BLOCK_POSITIONS)


def test_key_covers_all_of_its_scope() -> None:
    scopes = [
        SCOPE,
        PrefixScope("other", "class", 8),
        PrefixScope("store", "other", 8),
        PrefixScope("store", "class", 4),
        PrefixScope("store", "class", 8, policy="other"),
        PrefixScope("store", "class", 8, owner="o"),
    ]
    tokens = list(range(2 * BLOCK_POSITIONS))
    assert len({_keys(scope, tokens)[0] for scope in scopes}) == len(scopes)


def test_keys_made_piece_by_piece_are_those_made_at_once() -> None:
    tokens = list(range(4 * BLOCK_POSITIONS))
    keys: list[bytes] = []
    for num_blocks in (1, 1, 3, 4):
        extend_keys(keys, SCOPE.root(), tokens, num_blocks)
    whole: list[bytes] = []
    extend_keys(whole, SCOPE.root(), tokens, 4)
    assert keys == whole
    with pytest.raises(AssertionError, match="not full"):
        extend_keys(keys, SCOPE.root(), tokens[:-1], 5)


def _keys(scope: PrefixScope, tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, scope.root(), tokens, len(tokens) // BLOCK_POSITIONS)
    return keys
