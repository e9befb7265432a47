"""Several generators as one, in the order in which their items come. Called by `gateway.http.completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")
MAX_AHEAD = 64
"""Items that wait to be taken; then the generators wait."""


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all sources. The first error of any ends all, and is raised. All have been closed when this one has.

    A single source costs neither a task nor a queue.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield item
        return
    queue: asyncio.Queue[T | _Ended] = asyncio.Queue(MAX_AHEAD)
    tasks = [asyncio.ensure_future(_drain(source, queue)) for source in sources]
    try:
        num_open = len(tasks)
        while num_open:
            taken = await queue.get()
            if not isinstance(taken, _Ended):
                yield taken
                continue
            num_open -= 1
            if taken.error is not None:
                raise taken.error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for source in sources:
            await source.aclose()


class _Ended:
    def __init__(self, error: Exception | None) -> None:
        self.error = error


async def _drain(source: AsyncGenerator[T, None], queue: asyncio.Queue[T | _Ended]) -> None:
    error: Exception | None = None
    try:
        async with aclosing(source):
            async for item in source:
                await queue.put(item)
    except Exception as caught:  # noqa: BLE001 - raised by `merged`
        error = caught
    await queue.put(_Ended(error))
