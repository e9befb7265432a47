"""Work on the event loop that outlives the request that began it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

_running: set[asyncio.Task[None]] = set()
"""The event loop itself keeps only weak references."""


def detached(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin work that nobody has to wait for."""
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task
