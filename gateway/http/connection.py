"""Ends work as soon as its client has gone, and sends streamed answers.

A client that goes away shows as an ASGI message, as uvicorn gives it, or as the cancelling of the request's task.
Either way the work is cancelled and has ended when control leaves this module. Called by `gateway.http.app`.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import ClientGone, GatewayError, to_api_error
from gateway.http.answers import encode_event

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. Raises ClientGone when the client goes first. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        watcher.result()
        raise ClientGone
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def describe_bug(error: BaseException) -> str:
    """An unexpected error for the log: its type and where it arose, without its text, which may hold a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{frames}"


class EventStream(Response):
    """Server-sent events. An error before the first one is raised, so it gets an answer of its own; a later one
    becomes an event with the field error, as OpenAI's clients expect it, and ends the stream without [DONE]."""

    def __init__(self, events: AsyncGenerator[bytes, None], request_id: str) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._events, self._request_id = events, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._run(send))
        except ClientGone:
            logger.debug("the client of request %s has gone", self._request_id)

    async def _run(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            await _send_chunk(send, first)
            async with aclosing(self._rest(events)) as rest:
                async for event in rest:
                    await _send_chunk(send, event)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _rest(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The events after the first, and one for an error: the client must learn that its answer is cut."""
        error: GatewayError
        try:
            async for event in events:
                yield event
            return
        except GatewayError as caught:
            logger.warning("request %s ended in the middle: %s", self._request_id, caught)
            error = caught
        except Exception as caught:  # noqa: BLE001 - a bug, logged; too late for an answer of its own
            logger.error("request %s failed: %s", self._request_id, describe_bug(caught))
            error = GatewayError()
        yield encode_event(to_api_error(error).body())


async def _send_chunk(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
