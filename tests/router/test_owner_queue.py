"""Whose turn it is."""

from __future__ import annotations

import threading

from router.owner_queue import OwnerQueue


def test_owners_take_turns_and_each_ones_items_keep_their_order() -> None:
    queue = OwnerQueue[str]()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item)
    assert [queue.get() for _ in range(4)] == ["a1", "b1", "c1", "a2"]
    queue.put("c", "c2")
    queue.put("d", "d1")
    assert [queue.get() for _ in range(4)] == ["b2", "a3", "c2", "d1"]


def test_who_waits_gets_what_comes_and_nothing_more_once_it_is_closed() -> None:
    queue = OwnerQueue[int]()
    found: list[int | None] = []
    waiting = threading.Thread(target=lambda: found.extend((queue.get(), queue.get())))
    waiting.start()
    queue.put("a", 1)
    queue.close()
    waiting.join(10)
    assert found in ([1, None], [None, None])
    queue.put("a", 2)
    assert queue.get() is None
