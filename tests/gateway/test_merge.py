"""Several generators as one: everything arrives, the first error ends all, and nothing is left open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from gateway.errors import RouterBusy
from gateway.http.merge import MAX_AHEAD, merged


class Sources:
    """Generators that tell when they were closed."""

    def __init__(self) -> None:
        self.closed: list[int] = []

    async def make(
        self, number: int, count: int, error: Exception | None = None
    ) -> AsyncGenerator[int, None]:
        try:
            for item in range(count):
                await asyncio.sleep(0)
                yield 1000 * number + item
            if error is not None:
                raise error
            if count == 0:
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # as the router's generators, which cancel there
            self.closed.append(number)


@pytest.mark.parametrize("num_sources", [1, 2, 5])
def test_every_item_arrives_in_its_source_s_order(num_sources: int) -> None:
    async def run() -> list[int]:
        sources = Sources()
        count = 2 * MAX_AHEAD
        items = [item async for item in merged([sources.make(n, count) for n in range(num_sources)])]
        assert sorted(sources.closed) == list(range(num_sources))
        return items

    items = asyncio.run(run())
    for number in range(num_sources):
        assert [i % 1000 for i in items if i // 1000 == number] == list(range(2 * MAX_AHEAD))


@pytest.mark.parametrize("error", [RouterBusy(1.0), ValueError("a bug")])
def test_first_error_ends_all(error: Exception) -> None:
    async def run() -> None:
        sources = Sources()
        with pytest.raises(type(error)):
            async for _ in merged([sources.make(0, 0), sources.make(1, 2, error), sources.make(2, 900)]):
                pass
        assert sorted(sources.closed) == [0, 1, 2]

    asyncio.run(run())


def test_closing_closes_every_source() -> None:
    async def run() -> None:
        sources = Sources()
        async with aclosing(merged([sources.make(0, 0), sources.make(1, 900)])) as items:
            async for _ in items:
                break
        assert sorted(sources.closed) == [0, 1]

    asyncio.run(run())
