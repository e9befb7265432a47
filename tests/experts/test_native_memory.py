"""Memory of native calls: large blocks are kept for the next call, and nobody else has them meanwhile."""

from __future__ import annotations

import ctypes
import random
import threading

import pytest

from experts.native_build import LIBRARY

MIB = 1 << 20


@pytest.fixture(scope="module")
def memory() -> ctypes.CDLL:
    if not LIBRARY.exists():
        pytest.skip("no C compiler built the native products")
    library = ctypes.CDLL(str(LIBRARY))
    library.take_memory.restype = ctypes.c_void_p
    library.take_memory.argtypes = [ctypes.c_size_t]
    library.give_memory.argtypes = [ctypes.c_void_p]
    return library


def test_large_block_that_was_given_is_taken_again(memory: ctypes.CDLL) -> None:
    first = memory.take_memory(96 * MIB)
    memory.give_memory(first)
    again, beside = memory.take_memory(64 * MIB), memory.take_memory(64 * MIB)
    assert again == first
    assert beside != first
    memory.give_memory(again)
    memory.give_memory(beside)


def test_no_more_than_two_are_kept_and_those_are_the_largest(memory: ctypes.CDLL) -> None:
    sizes = [num_mib * MIB for num_mib in (200, 100, 150, 250)]
    taken = {memory.take_memory(size): size for size in sizes}
    for block in taken:
        memory.give_memory(block)
    kept = [memory.take_memory(200 * MIB), memory.take_memory(200 * MIB)]
    assert sorted(taken.get(block, 0) for block in kept) == [200 * MIB, 250 * MIB]
    for block in kept:
        memory.give_memory(block)


def test_nobody_else_writes_to_a_block_that_is_taken(memory: ctypes.CDLL) -> None:
    failures: list[str] = []

    def use(number: int) -> None:
        chance = random.Random(number)
        mark = bytes([number]) * 64
        for _ in range(400):
            size = chance.choice((100, 64 * 1024, 2 * MIB, 3 * MIB, 7 * MIB))
            block = memory.take_memory(size)
            ctypes.memmove(block, mark, 64)
            ctypes.memmove(block + size - 64, mark, 64)
            if block % 64 or any(ctypes.string_at(at, 64) != mark for at in (block, block + size - 64)):
                failures.append(f"{size} bytes of thread {number}")
            memory.give_memory(block)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
