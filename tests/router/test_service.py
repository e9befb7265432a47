"""The router as a service: streams of gateways, cancellation, readiness; many short requests at random."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from router import service as service_module
from router.batcher import BatchLimits
from router.errors import EngineStopped, QueueFull, StreamMissing
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.service import RouterService
from tests.engines import GatedEngine, open_engine, run_to_end, small_engine

TIMEOUT_S = 30.0
LIMITS = BatchLimits(max_running=16, max_waiting=16)

Events = AsyncGenerator[tuple[TokenEvent, ...], None]
Scenario = Callable[[RouterService, GatedEngine], Awaitable[None]]


@pytest.fixture(scope="module")
def loaded(tiny_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32", limits=LIMITS))
    yield loaded
    loaded.close()


def _play(loaded: LoadedEngine, scenario: Scenario) -> None:
    """Run a scenario on an event loop of its own. The service must hold nothing when it is over."""

    async def run() -> None:
        engine = GatedEngine(loaded.engine)
        service = RouterService(replace(loaded, engine=engine))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await scenario(service, engine)
        finally:
            engine.gate.set()
            await asyncio.to_thread(service.engine_thread.stop)

    asyncio.run(run())


def _request(name: str, length: int = 5, max_tokens: int = 4) -> GenerationRequest:
    chance = random.Random(name)
    prompt = tuple(chance.randrange(500) for _ in range(length))
    return GenerationRequest(name, prompt, SamplingParams(max_tokens, seed=length))


async def _open(service: RouterService, gateway: str) -> Events:
    stream = service.events(gateway)
    assert await anext(stream) == ()
    return stream


async def _collect(stream: Events, *names: str) -> dict[str, tuple[list[int], TokenEvent]]:
    """Read until every one of these requests has ended: tokens and last event of each."""
    tokens: dict[str, list[int]] = {name: [] for name in names}
    ends: dict[str, TokenEvent] = {}
    while ends.keys() < tokens.keys():
        for event in await anext(stream):
            assert event.request_id not in ends, "an event after the end"
            tokens[event.request_id].extend(event.token_ids)
            if event.finish_reason is not None:
                ends[event.request_id] = event
    return {name: (tokens[name], ends[name]) for name in names}


def _assert_empty(service: RouterService) -> None:
    held = {name: value for name, value in vars(service).items() if isinstance(value, dict)}
    assert not any(held.values()), held
    assert service.engine_thread.num_open == 0


def test_events_of_a_slow_gateway_are_merged_into_one_message(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        async with aclosing(await _open(service, "g")) as stream:
            for name in ("a", "b"):
                service.submit("g", _request(name, 5, 9))
            while service.engine_thread.num_open:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            events = await anext(stream)
        assert sorted(event.request_id for event in events) == ["a", "b"]
        assert all(len(event.token_ids) == 9 and event.finish_reason == "length" for event in events)
        _assert_empty(service)

    _play(loaded, scenario)


def test_first_and_last_event_of_a_request_are_urgent_and_no_others() -> None:
    async def run() -> None:
        outbox = service_module.Outbox()
        for name, ids, reason, is_first in [
            ("a", (1,), None, True),
            ("a", (2,), None, False),
            ("b", (3,), None, True),
            ("b", (4,), None, False),
            ("a", (5,), "stop", False),
            ("b", (6,), None, False),
        ]:
            outbox.add(TokenEvent(name, ids, reason, is_first=is_first))
            assert outbox.urgent.is_set() is (is_first or reason is not None), (name, ids)
            assert [event.token_ids for event in outbox.take()] == [ids]
            assert not outbox.filled.is_set()

    asyncio.run(run())


def test_urgent_events_leave_the_others_where_they_are() -> None:
    async def run() -> None:
        outbox = service_module.Outbox()
        for name, ids in (("a", (1,)), ("b", (2,))):
            outbox.add(TokenEvent(name, ids))
        outbox.take()
        outbox.add(TokenEvent("a", (3,)))
        outbox.add(TokenEvent("b", (4,), "stop"))
        assert [(event.request_id, event.token_ids) for event in outbox.take_urgent()] == [("b", (4,))]
        assert [(event.request_id, event.token_ids) for event in outbox.take()] == [("a", (3,))]
        assert not outbox.take_urgent()

    asyncio.run(run())


def test_last_event_that_comes_as_the_wait_for_it_ends_is_sent(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        stream = await _open(service, "g")
        outbox = service._outboxes["g"]

        async def over_just_then(event: asyncio.Event, timeout_s: float) -> bool:
            if not event.is_set():
                outbox.add(TokenEvent("late", (7,), "stop"))
            return False

        monkeypatch.setattr(service_module, "_is_filled", over_just_then)
        assert [event.token_ids for event in await anext(stream)] == [(7,)]
        await stream.aclose()

    _play(loaded, scenario)


def test_more_requests_get_their_events_less_often_down_to_ten_times_a_second() -> None:
    intervals = [service_module.send_interval_s(number) for number in (0, 1, 5, 20, 50, 512)]
    assert intervals == pytest.approx([0.01, 0.01, 0.01, 0.04, 0.1, 0.1])


def test_every_gateway_gets_its_own_events_only(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        streams = {name: await _open(service, name) for name in ("g", "h")}
        for name in ("g", "h"):
            service.submit(name, _request(f"{name}-r"))
        for name, stream in streams.items():
            assert len((await _collect(stream, f"{name}-r"))[f"{name}-r"][0]) == 4
            await stream.aclose()
        _assert_empty(service)

    _play(loaded, scenario)


def test_closing_a_stream_cancels_its_requests(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        left, stays = await _open(service, "left"), await _open(service, "stays")
        service.submit("left", _request("long", 5, 200))
        service.submit("stays", _request("r", 5, 30))
        await anext(left)
        await left.aclose()
        assert len((await _collect(stays, "r"))["r"][0]) == 30
        while service.engine_thread.num_open:
            await asyncio.sleep(0.001)
        assert engine.allocator.num_used == 0
        await asyncio.sleep(0.01)
        await stays.aclose()
        _assert_empty(service)

    _play(loaded, scenario)


def test_gateway_that_opens_a_new_stream_before_the_old_one_closes_keeps_its_requests(
    loaded: LoadedEngine,
) -> None:
    """The old stream's end, noticed late, must take neither the new stream nor its requests with it."""

    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        old = await _open(service, "g")
        service.submit("g", _request("before", 5, 200))
        async with aclosing(await _open(service, "g")) as new:
            service.submit("g", _request("after", 5, 20))
            await old.aclose()
            service.submit("g", _request("later"))
            answers = await _collect(new, "after", "later")
        assert [len(tokens) for tokens, _ in answers.values()] == [20, 4]
        while service.engine_thread.num_open:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        _assert_empty(service)

    _play(loaded, scenario)


def test_request_without_a_stream_is_refused_and_computes_nothing(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        with pytest.raises(StreamMissing, match="gone has no event stream"):
            service.submit("gone", _request("r"))
        _assert_empty(service)

    _play(loaded, scenario)


def test_unknown_ids_are_ignored(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        service.cancel("never-seen")
        async with aclosing(await _open(service, "g")) as stream:
            service.submit("g", _request("r"))
            service.cancel("other")
            answers = await _collect(stream, "r")
            service.cancel("r")
        assert len(answers["r"][0]) == 4

    _play(loaded, scenario)


def test_refused_request_leaves_nothing_behind(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        engine.gate.clear()
        async with aclosing(await _open(service, "g")) as stream:
            names = [f"r{number}" for number in range(LIMITS.max_open)]
            for name in names:
                service.submit("g", _request(name))
            with pytest.raises(QueueFull):
                service.submit("g", _request("refused"))
            with pytest.raises(ValueError, match="in use"):
                service.submit("g", _request("r0"))
            engine.gate.set()
            await _collect(stream, *names)
        _assert_empty(service)

    _play(loaded, scenario)


def test_two_hundred_random_requests_get_every_token_once(loaded: LoadedEngine) -> None:
    chance = random.Random(3)
    requests = [_request(f"r{n}", chance.randint(1, 20), chance.randint(1, 5)) for n in range(200)]
    reference = run_to_end(small_engine(loaded, 60), requests[::4] + requests[1::4]).tokens

    async def client(service: RouterService, stream: Events, gateway: str, mine: list[int]) -> None:
        tokens: dict[str, list[int]] = {}
        ends: dict[str, str] = {}

        async def read() -> None:
            async for events in stream:
                for event in events:
                    assert event.request_id not in ends, "an event after the end"
                    tokens.setdefault(event.request_id, []).extend(event.token_ids)
                    if event.finish_reason is not None:
                        ends[event.request_id] = event.finish_reason

        reader = asyncio.create_task(read())
        for number in mine:
            while True:
                try:
                    service.submit(gateway, requests[number])
                    break
                except QueueFull:
                    await asyncio.sleep(0.005)
            if number % 4 > 1:
                await asyncio.sleep(chance.choice((0, 0.001, 0.004)))
                service.cancel(f"r{number}")
        while len(ends) < len(mine) and not reader.done():
            await asyncio.sleep(0.005)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert ends.keys() == {f"r{number}" for number in mine}
        for number in mine:
            name = f"r{number}"
            if name in reference:
                assert (tokens[name], ends[name]) == (reference[name], "length")

    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        streams = {f"g{index}": await _open(service, f"g{index}") for index in range(3)}
        await asyncio.gather(
            *(
                client(service, stream, gateway, list(range(index, 200, 3)))
                for index, (gateway, stream) in enumerate(streams.items())
            )
        )
        for stream in streams.values():
            await stream.aclose()
        _assert_empty(service)
        assert engine.allocator.num_used == 0

    _play(loaded, scenario)


def test_idle_router_is_probed_and_not_again_within_the_probes_validity(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        assert (await service.health()).is_ready
        steps = engine.stats.steps
        assert steps > 0
        for _ in range(3):
            assert await service.health() == service_module.ServiceHealth(True, "idle")
        assert engine.stats.steps == steps
        _assert_empty(service)

    _play(loaded, scenario)


def test_busy_router_is_ready_without_a_probe_while_steps_complete(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        async with aclosing(await _open(service, "g")) as stream:
            service.submit("g", _request("r", 5, 100))
            await anext(stream)
            for _ in range(5):
                health = await service.health()
                assert health.is_ready
                assert health.detail == "1 running, 0 waiting"
                assert service.engine_thread.num_open == 1

    _play(loaded, scenario)


def test_stuck_engine_is_not_ready_after_five_seconds(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_s = 0.0
    now = time.monotonic

    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        nonlocal ahead_s
        engine.gate.clear()
        async with aclosing(await _open(service, "g")) as stream:
            service.submit("g", _request("r"))
            await asyncio.to_thread(engine.entered.wait, TIMEOUT_S)
            assert (await service.health()).is_ready
            monkeypatch.setattr(time, "monotonic", lambda: now() + ahead_s)
            ahead_s = 60.1
            assert service.is_stuck
            ahead_s = 5.1
            stuck = await service.health()
            ahead_s = 0.0
            assert not stuck.is_ready
            assert stuck.detail == "no progress for 5 s with work to do"
            assert not service.is_stuck
            engine.gate.set()
            await _collect(stream, "r")
            assert (await service.health()).is_ready

    _play(loaded, scenario)


def test_long_step_that_finishes_layers_is_ready(loaded: LoadedEngine) -> None:
    """A prompt's chunk of a large model may take longer than a stuck step is given."""

    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        engine.gate.clear()
        async with aclosing(await _open(service, "g")):
            service.submit("g", _request("r"))
            await asyncio.to_thread(engine.entered.wait, TIMEOUT_S)
            service.engine_thread._busy_since -= 60.0
            engine.backbone.progressed_at = time.monotonic()
            assert (await service.health()).is_ready
            engine.backbone.progressed_at -= 60.0
            assert not (await service.health()).is_ready

    _play(loaded, scenario)


def test_probe_that_is_not_answered_makes_the_router_not_ready(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "PROBE_TIMEOUT_S", 0.05)

    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        engine.gate.clear()
        health = await service.health()
        assert not health.is_ready
        assert "probe" in health.detail
        engine.gate.set()
        while service.engine_thread.num_open:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert (await service.health()).is_ready
        _assert_empty(service)

    _play(loaded, scenario)


def test_failed_engine_ends_requests_and_is_not_ready(loaded: LoadedEngine) -> None:
    async def scenario(service: RouterService, engine: GatedEngine) -> None:
        engine.failure = RuntimeError("secret detail")
        async with aclosing(await _open(service, "g")) as stream:
            service.submit("g", _request("r"))
            end = (await _collect(stream, "r"))["r"][1]
            assert (end.finish_reason, end.error) == ("error", "the engine failed")
            assert end.is_resumable  # it is no request's fault, as far as anybody knows
            assert not (await service.health()).is_ready
            with pytest.raises(EngineStopped):
                service.submit("g", _request("s"))
        _assert_empty(service)

    _play(loaded, scenario)
