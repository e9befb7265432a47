"""A queue in which owners take turns: who has asked for much waits longer than who asks for little.

Used by `router.media.encoding_thread` and `router.grammar_thread`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class OwnerQueue(Generic[T]):
    """Items of each owner in their order, and of owners in turn. Any thread may call."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        """By owner; the first one's turn comes next. None is empty."""
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, owner: str, item: T) -> None:
        with self._changed:
            self._waiting.setdefault(owner, deque()).append(item)
            self._changed.notify()

    def close(self) -> None:
        """Whoever waits gets nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def get(self) -> T | None:
        """The next item, when there is one; None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            owner, items = self._waiting.popitem(last=False)
            item = items.popleft()
            if items:
                self._waiting[owner] = items
            return item
