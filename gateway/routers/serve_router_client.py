"""The Serve shell of one router, seen from a gateway: small calls to submit, and one event stream for all requests.

Each router is a deployment of its own with one replica, `router-0` to `router-N-1`. Replicas of one deployment would be
hidden behind one handle: Serve picks one for every call, and a request's submission, its events and its cancelling must
reach the same. Serve's affinity by multiplexed model id is a preference, which it gives up under load. A deployment a
router makes the handle an address, and Serve still replaces the replica when it dies; which router gets a request is
decided by `gateway.routers.choice`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gateway.errors import (
    ApiError,
    GatewayError,
    GenerationFailed,
    RouterBusy,
    RouterLost,
    RouterSilent,
    RouterUnavailable,
)
from gateway.routers.client import RouterHealth
from gateway.routers.detached import detached
from gateway.routers.submissions import Submissions
from router.errors import EngineStopped, QueueFull, RequestTooLong, RouterError, StreamMissing
from router.request import GenerationRequest, TokenEvent

logger = logging.getLogger(__name__)

STREAM_RETRIES, STREAM_RETRY_S = 40, 0.05
"""How often and when a request is offered again to a router that has just ended our idle stream."""
ANSWER_TIMEOUT_S = 8.0
"""For small calls. Serve keeps those for a router that is being replaced, so that without a limit they would wait."""
CONNECT_TIMEOUT_S = 5.0
"""For a stream to stand. Another router may take the request meanwhile, so it is short."""
SERVE_ERRORS = (ray.exceptions.RayError, RayServeException)


class ServeRouterClient:
    """`gateway.routers.client.RouterLink` over a Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._name = f"gateway-{uuid.uuid4().hex[:12]}"
        self._submissions = Submissions(self._send)
        self._queues: dict[str, asyncio.Queue[TokenEvent | None]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._standing = asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """See RouterClient.generate."""
        queue: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        self._queues[request.request_id] = queue
        submitting = detached(self._submit(request))
        is_done = False
        try:
            await asyncio.shield(submitting)
            while not is_done:
                event = await queue.get()
                if event is None:
                    raise RouterLost("its event stream broke")
                is_done = event.finish_reason is not None
                yield event
        finally:
            del self._queues[request.request_id]
            if not is_done:
                detached(self._cancel(request.request_id, submitting))

    def abandon(self) -> None:
        """See RouterLink.abandon."""
        if self._reader is not None:
            self._reader.cancel()

    async def feedback(self, answer_id: str, score: float) -> bool:
        return bool(await self._ask(self._handle.feedback.remote(answer_id, score)))

    async def health(self) -> RouterHealth:
        try:
            answer: RouterHealth = await _answer(self._handle.health.remote())
        except TimeoutError:
            return RouterHealth(False, "the router does not answer")
        except SERVE_ERRORS as error:
            return RouterHealth(False, type(error).__name__)
        return answer

    async def metrics(self) -> str:
        return str(await self._ask(self._handle.metrics.remote()))

    async def status(self) -> dict[str, object]:
        return dict(await self._ask(self._handle.status.remote()))

    async def _ask(self, response: Any) -> Any:
        try:
            return await _answer(response)
        except TimeoutError as error:
            raise RouterUnavailable("it does not answer") from error
        except SERVE_ERRORS as error:
            raise RouterUnavailable(type(error).__name__) from error

    async def _send(self, requests: tuple[GenerationRequest, ...]) -> Sequence[Exception | None]:
        refusals: Sequence[Exception | None]
        try:
            refusals = await _answer(self._handle.submit.remote(self._name, requests))
        except ray.exceptions.RayTaskError:  # the router's own answer
            raise
        except TimeoutError as error:
            raise RouterSilent("it does not answer") from error
        except SERVE_ERRORS as error:
            raise RouterSilent(type(error).__name__) from error
        return refusals

    async def _submit(self, request: GenerationRequest) -> None:
        """Raises what the router's refusal means to a client."""
        await self._connect()
        for _ in range(STREAM_RETRIES):
            try:
                await self._submissions.submit(request)
                return
            except (RouterError, ValueError, ray.exceptions.RayTaskError) as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                if not isinstance(cause, StreamMissing):
                    raise _refusal(cause) from error
            # The router has just ended our idle stream; the reader opens another.
            await asyncio.sleep(STREAM_RETRY_S)
        raise RouterUnavailable("it has no stream of ours")

    async def _cancel(self, request_id: str, submitting: asyncio.Task[None]) -> None:
        """When it is there, or may be. A router that was taken for dead may live; one that is new does not know the
        request."""
        await asyncio.wait({submitting})
        if _is_refused(submitting.exception()):
            return
        with suppress(RouterUnavailable):
            await self._ask(self._handle.cancel_request.remote(request_id))

    async def _connect(self) -> None:
        if self._reader is None or self._reader.done():
            self._standing.clear()
            self._reader = detached(self._read())
        try:
            await asyncio.wait_for(self._standing.wait(), CONNECT_TIMEOUT_S)
        except TimeoutError as error:
            raise RouterUnavailable("it does not answer") from error

    async def _read(self) -> None:
        """Hand events to their requests while there are any. When a stream breaks, every open request is told."""
        try:
            while self._queues:
                await self._read_stream()
        except SERVE_ERRORS as error:
            logger.warning("the router's event stream broke: %s", type(error).__name__)
        finally:
            for queue in self._queues.values():
                queue.put_nowait(None)

    async def _read_stream(self) -> None:
        """Until the router ends it, which it does when it has none of our requests."""
        stream: Any = self._handle.options(stream=True).events.remote(self._name)
        try:
            async for events in stream:
                self._standing.set()
                for event in events:
                    queue = self._queues.get(event.request_id)
                    if queue is not None:
                        queue.put_nowait(event)
        except asyncio.CancelledError:
            stream.cancel()
            raise


def _is_refused(failure: BaseException | None) -> bool:
    """Whether the router has surely not taken a request: not where it is silent, or failed in the middle."""
    is_told = isinstance(failure, ApiError | RouterBusy | RouterUnavailable)
    return is_told and not isinstance(failure, RouterSilent)


def _refusal(cause: Exception) -> GatewayError:
    """Only what another router, or the same one later, may do better is RouterUnavailable."""
    if isinstance(cause, QueueFull):
        return RouterBusy(cause.retry_after_s)
    if isinstance(cause, RequestTooLong):
        return ApiError(400, f"Not enough memory for this request: {cause}.", code="context_length_exceeded")
    if isinstance(cause, EngineStopped):
        return RouterUnavailable(str(cause))
    name = type(cause).__name__
    return RouterUnavailable(name) if isinstance(cause, SERVE_ERRORS) else GenerationFailed(name)


async def _answer(response: Any) -> Any:
    """Raises TimeoutError."""
    try:
        return await asyncio.wait_for(_awaited(response), ANSWER_TIMEOUT_S)
    except TimeoutError:
        response.cancel()
        raise


async def _awaited(response: Any) -> Any:
    return await response
