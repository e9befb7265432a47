"""The router as a service inside one process: an engine thread, and streams of events for gateways.

All events of one gateway travel in one stream, and whatever a gateway has not taken yet is merged, so the cost of
a message does not grow with the number of tokens or requests. Knows asyncio, nothing of Ray or HTTP. Called by
`gateway.service.router_replica`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from router.arrivals import Arrivals
from router.engine_thread import EngineHealth, EngineThread
from router.errors import RouterError, StreamMissing
from router.feedback import FeedbackDesk, RewardSink
from router.loading import LoadedEngine
from router.request import GenerationRequest, SamplingParams, TokenEvent

logger = logging.getLogger(__name__)

WEDGED_AFTER_S = 5.0
STUCK_AFTER_S = 60.0
"""Without progress the service is not ready; after this long it has to be replaced. Reading the experts of one layer
from a slow disk is allowed to take a while."""
PROBE_TIMEOUT_S = 5.0
PROBE_VALID_S = 2.0
SEND_INTERVAL_S, SEND_INTERVAL_A_REQUEST_S, MOST_SEND_INTERVAL_S = 0.01, 0.002, 0.1
"""Least time between two messages to a gateway, with few requests and for each of many. A message is an event for every
request in it, which on its way to the client costs about as much as the token of a small model. The first token of a
request and its last never wait."""

STREAM_IDLE_S = 1.0
"""How long a gateway's stream stays open without requests."""


@dataclass(frozen=True)
class ServiceHealth:
    """Whether requests would be served now, and why not."""

    is_ready: bool
    detail: str


class Outbox:
    """Events that one stream of a gateway has not taken yet, merged by request."""

    def __init__(self) -> None:
        self.pending: dict[str, TokenEvent] = {}
        self.filled = asyncio.Event()
        self.urgent = asyncio.Event()
        """Whether there are some that do not wait."""
        self.open_requests: set[str] = set()
        self._hurried: set[str] = set()
        """Requests with events that do not wait."""

    def add(self, event: TokenEvent) -> None:
        name = event.request_id
        if event.is_urgent:
            self.urgent.set()
            self._hurried.add(name)
        earlier = self.pending.get(name)
        self.pending[name] = event if earlier is None else earlier.followed_by(event)
        self.filled.set()

    def take(self) -> tuple[TokenEvent, ...]:
        """What is there, once."""
        self.filled.clear()
        self.urgent.clear()
        self._hurried.clear()
        events, self.pending = tuple(self.pending.values()), {}
        return events

    def take_urgent(self) -> tuple[TokenEvent, ...]:
        """What does not wait; the others stay."""
        self.urgent.clear()
        hurried, self._hurried = self._hurried, set()
        return tuple(self.pending.pop(name) for name in hurried)


class RouterService:
    """Created and used on one event loop; the engine runs beside it."""

    def __init__(self, loaded: LoadedEngine, reward_sinks: Sequence[RewardSink] = ()) -> None:
        self.loaded = loaded
        self.feedback = FeedbackDesk(reward_sinks)
        self._loop = asyncio.get_running_loop()
        self._outboxes: dict[str, Outbox] = {}
        """Of each gateway's newest stream."""
        self._outbox_of: dict[str, Outbox] = {}
        """By request: a gateway that opens a new stream must not get the old one's events in it."""
        self._probes: dict[str, asyncio.Future[TokenEvent]] = {}
        self._probed_at = float("-inf")
        self._num_probes = 0
        self._arrivals = Arrivals(self._loop, self._deliver)
        self.engine_thread = EngineThread(loaded.engine, self._arrivals.put, loaded.media, loaded.speech)
        self.engine_thread.start()

    @property
    def num_open(self) -> int:
        """Requests of gateways that are not answered yet; probes are none."""
        return len(self._outbox_of)

    def submit(self, gateway: str, request: GenerationRequest) -> None:
        """Queue a request whose events go to the stream that `gateway` has open.

        Raises StreamMissing, QueueFull, RequestTooLong or EngineStopped; ValueError for a used id.
        """
        outbox = self._outboxes.get(gateway)
        if outbox is None:
            raise StreamMissing(gateway)
        if request.routing.policy == "snarc":
            reward = self.feedback.running.value
            request = replace(request, routing=replace(request.routing, reward=reward))
        self.engine_thread.submit(request)
        if request.speech is None:  # a score is the text's, and counts once
            self.feedback.note(request.answer_id or request.request_id, request.request_id)
        outbox.open_requests.add(request.request_id)
        self._outbox_of[request.request_id] = outbox

    def cancel(self, request_id: str) -> None:
        """End a request before the next step and free its memory; unknown ids are ignored."""
        if request_id in self._outbox_of:
            self.engine_thread.cancel(request_id)

    async def events(self, gateway: str) -> AsyncGenerator[tuple[TokenEvent, ...], None]:
        """All events of a gateway's requests, merged into messages. Closing it cancels its requests.

        Ends by itself after a while without requests, so that a router that is told to stop can: the gateway asks
        for a new stream when it has a request.
        """
        self._outboxes[gateway] = outbox = Outbox()
        try:
            yield ()  # tells the gateway that its stream stands
            # A last event may have come just when the wait for it was over.
            while await self._has_events(outbox) or outbox.open_requests or outbox.pending:
                if events := outbox.take():
                    yield events
                    next_s = self._loop.time() + send_interval_s(len(outbox.open_requests))
                    while (left_s := next_s - self._loop.time()) > 0.0:
                        if await _is_filled(outbox.urgent, left_s):
                            yield outbox.take_urgent()
        finally:
            if outbox.open_requests:
                logger.info("gateway %s left; cancelling its %d requests", gateway, len(outbox.open_requests))
            for request_id in tuple(outbox.open_requests):
                self.cancel(request_id)
            if self._outboxes.get(gateway) is outbox:
                del self._outboxes[gateway]

    async def _has_events(self, outbox: Outbox) -> bool:
        """Waits for some, not for ever."""
        with self._arrivals.awaited():
            return await _is_filled(outbox.filled, STREAM_IDLE_S)

    async def health(self) -> ServiceHealth:
        """Ready while steps complete; when idle, a one-token probe is computed, at most every few seconds."""
        facts = self.engine_thread.health()
        if not facts.is_alive:
            return ServiceHealth(False, "the engine has stopped")
        progressed_s = self._progressed_s(facts)
        if facts.has_work:
            if progressed_s <= WEDGED_AFTER_S:
                return ServiceHealth(True, f"{facts.num_running} running, {facts.num_waiting} waiting")
            return ServiceHealth(False, f"no progress for {progressed_s:.0f} s with work to do")
        if time.monotonic() - self._probed_at <= PROBE_VALID_S:
            return ServiceHealth(True, "idle")
        return await self._probe()

    @property
    def is_stuck(self) -> bool:
        """Whether it has had work for so long without progress that nothing but a new process will help."""
        facts = self.engine_thread.health()
        is_engine_stuck = facts.has_work and self._progressed_s(facts) > STUCK_AFTER_S
        return is_engine_stuck or facts.speech_stalled_s > STUCK_AFTER_S

    def _progressed_s(self, facts: EngineHealth) -> float:
        """Seconds since a step or a layer was finished."""
        return min(facts.seconds_since_step, time.monotonic() - self.loaded.engine.backbone.progressed_at)

    def close(self) -> None:
        self.engine_thread.stop()
        self.loaded.close()

    async def _probe(self) -> ServiceHealth:
        self._num_probes += 1
        name = f"probe-{self._num_probes}"
        answered: asyncio.Future[TokenEvent] = self._loop.create_future()
        self._probes[name] = answered
        try:
            self.engine_thread.submit(
                GenerationRequest(name, (0,), SamplingParams(max_tokens=1, temperature=0.0))
            )
            event = await asyncio.wait_for(answered, PROBE_TIMEOUT_S)
        except TimeoutError:
            self.engine_thread.cancel(name)
            return ServiceHealth(False, f"a probe took more than {PROBE_TIMEOUT_S:.0f} s")
        except RouterError as error:
            return ServiceHealth(False, str(error))
        finally:
            del self._probes[name]
        if event.finish_reason == "error":
            return ServiceHealth(False, event.error or "a probe failed")
        self._probed_at = time.monotonic()
        return ServiceHealth(True, "idle")

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            probe = self._probes.get(event.request_id)
            if probe is not None:
                if event.finish_reason is not None and not probe.done():
                    probe.set_result(event)
                continue
            outbox = self._outbox_of.get(event.request_id)
            if outbox is None:
                continue
            if event.finish_reason is not None:
                del self._outbox_of[event.request_id]
                outbox.open_requests.discard(event.request_id)
            outbox.add(event)


def send_interval_s(num_requests: int) -> float:
    """Between two messages to a gateway with so many open requests; see SEND_INTERVAL_S."""
    return min(max(SEND_INTERVAL_S, SEND_INTERVAL_A_REQUEST_S * num_requests), MOST_SEND_INTERVAL_S)


async def _is_filled(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    return True
