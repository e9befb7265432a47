"""Events between an engine's thread and an event loop: all of them, in order, with few wake-ups."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from router.arrivals import Arrivals
from router.request import TokenEvent

FIRST, LATER, LAST = (
    TokenEvent("a", (1,), is_first=True),
    TokenEvent("a", (2,)),
    TokenEvent("a", (3,), "stop"),
)


class _CountedLoop:
    """Of an event loop, what `Arrivals` uses."""

    def __init__(self) -> None:
        self.num_woken = 0

    def call_soon_threadsafe(self, _call: object) -> None:
        self.num_woken += 1


def _arrivals() -> tuple[Arrivals, _CountedLoop, list[TokenEvent]]:
    loop, delivered = _CountedLoop(), list[TokenEvent]()
    return Arrivals(loop, delivered.extend), loop, delivered  # type: ignore[arg-type]


def test_only_first_and_last_events_wake_a_loop_that_does_not_wait() -> None:
    arrivals, loop, delivered = _arrivals()
    for event, num_woken in ((FIRST, 1), (LATER, 1), (LATER, 1), (LAST, 2)):
        arrivals.put([event])
        assert loop.num_woken == num_woken
    assert not delivered
    arrivals.collect()
    assert delivered == [FIRST, LATER, LATER, LAST]


def test_loop_that_waits_gets_what_was_there_and_is_woken_by_any_event() -> None:
    arrivals, loop, delivered = _arrivals()
    arrivals.put([LATER])
    with arrivals.awaited():
        assert delivered == [LATER]
        arrivals.put([LATER])
        assert loop.num_woken == 1
    arrivals.put([LATER])
    assert loop.num_woken == 1


def test_every_event_arrives_once_and_in_order_however_a_loop_waits() -> None:
    num_events = 2000

    async def run() -> list[int]:
        numbers: list[int] = []
        is_there = asyncio.Event()

        def deliver(events: Sequence[TokenEvent]) -> None:
            numbers.extend(event.token_ids[0] for event in events)
            is_there.set()

        arrivals = Arrivals(asyncio.get_running_loop(), deliver)

        def engine() -> None:
            for number in range(num_events):
                arrivals.put([TokenEvent("a", (number,), is_first=number % 97 == 0)])

        thread = threading.Thread(target=engine)
        thread.start()
        while len(numbers) < num_events:
            with arrivals.awaited():
                await asyncio.wait_for(is_there.wait(), 10.0)  # one that was lost would be waited for
            is_there.clear()
            await asyncio.sleep(0.0)
        thread.join()
        return numbers

    assert asyncio.run(run()) == list(range(num_events))


def test_events_for_a_loop_that_has_closed_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    Arrivals(loop, lambda events: None).put([FIRST])
