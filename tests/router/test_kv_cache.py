"""The block allocator's books under any order of operations, and the pool's copies."""

from __future__ import annotations

import random

import pytest
import torch

from router.attention import BLOCK_POSITIONS
from router.errors import KvExhausted
from router.kv_cache import BlockAllocator, BlockCopy, KvPool, blocks_for
from tests.router.configs import tiny_config


def test_allocate_and_free_return_every_block() -> None:
    allocator = BlockAllocator(9)
    allocator.allocate("a", 3 * BLOCK_POSITIONS)
    allocator.allocate("b", 1)
    assert (allocator.num_used, allocator.num_free) == (4, 4)
    allocator.free("a")
    allocator.free("b")
    assert allocator.num_free == 8
    allocator.check()


def test_the_zero_block_is_never_handed_out() -> None:
    allocator = BlockAllocator(5)
    allocator.allocate("a", 4 * BLOCK_POSITIONS)
    assert 0 not in allocator.table("a")


def test_exhaustion_raises_and_changes_nothing() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate("a", 2 * BLOCK_POSITIONS)
    with pytest.raises(KvExhausted, match="3 KV blocks needed, 1 free"):
        allocator.extend("a", 5 * BLOCK_POSITIONS)
    assert len(allocator.table("a")) == 2
    allocator.check()


def test_extend_within_the_last_block_takes_nothing() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate("a", 1)
    allocator.extend("a", BLOCK_POSITIONS)
    assert allocator.num_used == 1
    allocator.extend("a", BLOCK_POSITIONS + 1)
    assert allocator.num_used == 2


def test_fork_shares_until_one_side_writes() -> None:
    allocator = BlockAllocator(8)
    allocator.allocate("parent", 2 * BLOCK_POSITIONS)
    allocator.fork("parent", "child")
    assert allocator.num_used == 2
    before = allocator.table("child")
    copies = allocator.unshare("child", BLOCK_POSITIONS + 3, BLOCK_POSITIONS + 4)
    assert copies == [BlockCopy(before[1], allocator.table("child")[1])]
    assert allocator.table("child")[0] == allocator.table("parent")[0]
    assert allocator.unshare("parent", BLOCK_POSITIONS, BLOCK_POSITIONS + 1) == []
    assert len(allocator.free("parent")) == 1, "only what the child does not hold"
    allocator.check()
    assert len(allocator.free("child")) == 2
    assert allocator.num_free == 7


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_operations_keeps_the_books(seed: int) -> None:
    chance = random.Random(seed)
    allocator = BlockAllocator(24)
    lengths: dict[str, int] = {}
    for number in range(300):
        action = chance.choice(["allocate", "extend", "fork", "unshare", "free"])
        name = chance.choice(sorted(lengths)) if lengths else ""
        try:
            if action == "allocate":
                length = chance.randint(1, 6 * BLOCK_POSITIONS)
                allocator.allocate(f"s{number}", length)
                lengths[f"s{number}"] = length
            elif not name:
                continue
            elif action == "extend":
                length = lengths[name] + chance.randint(0, 2 * BLOCK_POSITIONS)
                allocator.extend(name, length)
                lengths[name] = length
            elif action == "fork":
                allocator.fork(name, f"s{number}")
                lengths[f"s{number}"] = lengths[name]
            elif action == "unshare":
                first = chance.randrange(lengths[name])
                allocator.unshare(name, first, lengths[name])
            else:
                allocator.free(name)
                del lengths[name]
        except KvExhausted:
            pass
        allocator.check()
        for held, length in lengths.items():
            assert len(allocator.table(held)) >= blocks_for(length)


def test_swapped_blocks_come_back_bit_for_bit() -> None:
    pool = KvPool(tiny_config(), 6, torch.bfloat16)
    pool.keys.copy_(torch.randn(pool.keys.shape))
    pool.values.copy_(torch.randn(pool.values.shape))
    saved = pool.swap_out((2, 4))
    expected = pool.keys[:, [2, 4]].clone(), pool.values[:, [2, 4]].clone()
    pool.keys.zero_()
    pool.values.zero_()
    pool.swap_in((5, 1, 3), saved)
    assert torch.equal(pool.keys[:, [5, 1]], expected[0])
    assert torch.equal(pool.values[:, [5, 1]], expected[1])
    assert not pool.keys[:, 3].any()


def test_gather_returns_what_was_written_in_table_order() -> None:
    config = tiny_config()
    pool = KvPool(config, 4, torch.float32)
    rows = torch.randn(2, config.num_kv_heads, config.head_dim)
    pool.write(1, torch.tensor([3, 2]), torch.tensor([0, 7]), rows, -rows)
    keys, values = pool.gather(1, torch.tensor([[2, 3]]))
    assert torch.equal(keys[:, 0, 7], rows[1])
    assert torch.equal(values[:, 1, 0], -rows[0])
    assert not pool.gather(0, torch.tensor([[2, 3]]))[0].any()
