"""The gateway's end of one router, over a handle that is none of Ray Serve's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RequestCancelledError

from gateway.errors import RouterBusy, RouterUnavailable
from gateway.routers import serve_router_client as client_module
from gateway.routers.serve_router_client import ServeRouterClient
from router.errors import QueueFull, StreamMissing
from router.request import GenerationRequest, TokenEvent


class _Response:
    """What a handle's call returns."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, None, Any]:
        return self._work.__await__()

    def cancel(self) -> None:
        return


class _Stream:
    """What a handle's call returns where it streams."""

    def __init__(self, messages: AsyncIterator[tuple[TokenEvent, ...]]) -> None:
        self._messages = messages
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[tuple[TokenEvent, ...]]:
        return self._messages

    def cancel(self) -> None:
        self.is_cancelled = True


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class _Router:
    """A router's handle. Its stream stays open, and brings what is put into it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.messages: asyncio.Queue[tuple[TokenEvent, ...]] = asyncio.Queue()
        self.may_submit = asyncio.Event()
        self.may_submit.set()
        self.refusals: list[Exception | None] = []
        """Of the next requests, in order; then none."""
        self.failure: Exception | None = None
        self.answers_after_s = 0.0
        self.submit = _Method(lambda gateway, requests: _Response(self._submit(requests)))
        self.cancel_request = _Method(lambda name: _Response(self._cancel(name)))
        self.stream = _Stream(self._events())
        self.events = _Method(lambda gateway: self.stream)

    def options(self, *, stream: bool) -> _Router:
        assert stream
        return self

    async def _submit(self, requests: Sequence[GenerationRequest]) -> list[Exception | None]:
        await self.may_submit.wait()
        self.calls.append(("submit", tuple(request.request_id for request in requests)))
        if self.failure is not None:
            raise self.failure
        await asyncio.sleep(self.answers_after_s)
        return [self.refusals.pop(0) if self.refusals else None for _ in requests]

    async def _cancel(self, name: str) -> None:
        self.calls.append(("cancel", (name,)))

    async def _events(self) -> AsyncIterator[tuple[TokenEvent, ...]]:
        yield ()
        while True:
            yield await self.messages.get()


async def _answer(client: ServeRouterClient, name: str) -> list[int]:
    return [
        token async for event in client.generate(GenerationRequest(name, (1,))) for token in event.token_ids
    ]


def _play(scenario: Callable[[_Router, ServeRouterClient], Awaitable[None]]) -> None:
    async def run() -> None:
        router = _Router()
        client = ServeRouterClient(cast(Any, router))
        async with asyncio.timeout(20.0):
            await scenario(router, client)
            client.abandon()
            while not router.stream.is_cancelled:
                await asyncio.sleep(0)

    asyncio.run(run())


def test_requests_that_come_together_are_submitted_in_one_call_and_get_their_own_events() -> None:
    async def scenario(router: _Router, client: ServeRouterClient) -> None:
        answers = [asyncio.create_task(_answer(client, name)) for name in "ab"]
        while not router.calls:
            await asyncio.sleep(0.001)
        router.messages.put_nowait((TokenEvent("a", (1,)), TokenEvent("b", (2, 3), "stop")))
        router.messages.put_nowait((TokenEvent("a", (4,), "stop"),))
        assert await asyncio.gather(*answers) == [[1, 4], [2, 3]]
        assert router.calls == [("submit", ("a", "b"))]

    _play(scenario)


def test_request_that_is_left_while_it_is_submitted_is_cancelled_when_it_is_there() -> None:
    async def scenario(router: _Router, client: ServeRouterClient) -> None:
        router.may_submit.clear()
        answer = asyncio.create_task(_answer(client, "a"))
        await asyncio.sleep(0.05)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert not router.calls
        router.may_submit.set()
        while len(router.calls) < 2:
            await asyncio.sleep(0.001)
        assert router.calls == [("submit", ("a",)), ("cancel", ("a",))]

    _play(scenario)


def test_request_that_the_router_may_have_taken_though_it_did_not_answer_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "ANSWER_TIMEOUT_S", 0.1)

    async def scenario(router: _Router, client: ServeRouterClient) -> None:
        router.answers_after_s = 0.3
        answers = [asyncio.create_task(_answer(client, name)) for name in "ab"]
        for outcome in await asyncio.gather(*answers, return_exceptions=True):
            assert isinstance(outcome, RouterUnavailable)
        while len(router.calls) < 3:
            await asyncio.sleep(0.001)
        assert router.calls == [("submit", ("a", "b")), ("cancel", ("a",)), ("cancel", ("b",))]

    _play(scenario)


def test_request_of_a_call_that_failed_at_the_router_is_cancelled() -> None:
    async def scenario(router: _Router, client: ServeRouterClient) -> None:
        router.failure = KeyError("a bug")
        with pytest.raises(KeyError):
            await _answer(client, "a")
        while len(router.calls) < 2:
            await asyncio.sleep(0.001)
        assert router.calls == [("submit", ("a",)), ("cancel", ("a",))]

    _play(scenario)


@pytest.mark.parametrize("failure", [RayActorError(), RequestCancelledError("r")])
def test_request_that_finds_no_router_may_be_asked_for_again(failure: Exception) -> None:
    async def scenario(router: _Router, client: ServeRouterClient) -> None:
        router.failure = failure
        with pytest.raises(RouterUnavailable):
            await _answer(client, "a")
        router.failure = None
        router.messages.put_nowait((TokenEvent("b", (7,), "stop"),))
        assert await _answer(client, "b") == [7]

    _play(scenario)


def test_request_that_was_refused_is_not_cancelled() -> None:
    async def scenario(router: _Router, client: ServeRouterClient) -> None:
        router.refusals = [QueueFull(3, 2.0)]
        with pytest.raises(RouterBusy):
            await _answer(client, "a")
        await asyncio.sleep(0.05)
        assert router.calls == [("submit", ("a",))]

    _play(scenario)


def test_request_is_offered_again_where_the_stream_had_just_ended() -> None:
    async def scenario(router: _Router, client: ServeRouterClient) -> None:
        router.refusals = [StreamMissing("g")]
        answer = asyncio.create_task(_answer(client, "a"))
        while len(router.calls) < 2:
            await asyncio.sleep(0.001)
        router.messages.put_nowait((TokenEvent("a", (7,), "stop"),))
        assert await answer == [7]
        assert router.calls == [("submit", ("a",))] * 2

    _play(scenario)


def test_request_that_is_closed_in_the_middle_is_cancelled() -> None:
    async def scenario(router: _Router, client: ServeRouterClient) -> None:
        router.messages.put_nowait((TokenEvent("a", (1,)),))
        generated: Any = client.generate(GenerationRequest("a", (1,)))
        async with aclosing(generated) as events:
            assert (await anext(events)).token_ids == (1,)
        while len(router.calls) < 2:
            await asyncio.sleep(0.001)
        assert router.calls == [("submit", ("a",)), ("cancel", ("a",))]

    _play(scenario)
