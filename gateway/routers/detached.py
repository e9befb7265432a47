"""Work on the event loop that outlives the request that began it."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

_running: set[asyncio.Task[None]] = set()
"""The event loop itself keeps only weak references."""


def detached(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin work in a context of its own: Ray Serve ends whatever a request's context has called when the request's
    client leaves."""
    task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task
