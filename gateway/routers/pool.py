"""Several routers as one: new requests go to the one with the least to do, and a request outlives its router.

When a router is lost, each of its requests is asked for again at another, or at the same once it is back, with the
tokens received so far and the same seed, and goes on as if nothing had happened (`gateway.routers.resumption`). Where
that takes too long, the request ends with an error. Knows nothing of Ray; built by `gateway.service.gateway_replica`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from gateway.errors import RouterBusy, RouterLost, RouterUnavailable
from gateway.routers.choice import RouterLoad, choose_router, routers_to_leave
from gateway.routers.client import RouterHealth, RouterLink
from gateway.routers.detached import detached
from gateway.routers.metrics import PoolCounts, join_metrics, render_pool
from gateway.routers.resumption import ResumableRequest
from gateway.routers.views import RouterView, join_health, join_status
from router.request import GenerationRequest, TokenEvent

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class PoolLimits:
    """In seconds."""

    resume_timeout_s: float = 60.0
    """How long a request may be without a router, from the loss of the last to the first event of the next."""
    retry_s: float = 0.25
    watch_interval_s: float = 2.0
    """How often routers with open requests are asked whether they are ready."""
    patience_s: float = 15.0
    """How long one of several may be not ready before its requests leave it."""


class _Member:
    """One router of the pool."""

    def __init__(self, name: str, link: RouterLink) -> None:
        self.name, self.link = name, link
        self.open: dict[str, ResumableRequest] = {}
        self.lost_at_s: float | None = None
        self.unready_since_s: float | None = None

    def load(self) -> RouterLoad:
        requests = self.open.values()
        groups = frozenset(r.request.group for r in requests if r.request.group is not None)
        num_tokens = sum(r.num_tokens for r in requests)
        return RouterLoad(len(self.open), num_tokens, groups, self.lost_at_s, self.unready_since_s)

    def note_health(self, is_ready: bool, now_s: float) -> None:
        if is_ready:
            self.lost_at_s = self.unready_since_s = None
        elif self.unready_since_s is None:
            self.unready_since_s = now_s


class RouterPool:
    """A `gateway.routers.client.RouterClient` over routers that answer alike. Used on one event loop."""

    def __init__(
        self,
        links: Mapping[str, RouterLink],
        limits: PoolLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """links: by the routers' names, in their order."""
        self._members = [_Member(name, link) for name, link in links.items()]
        self._limits = limits or PoolLimits()
        self._clock = clock
        self._watcher: asyncio.Task[None] | None = None
        self._num_resumed = self._num_given_up = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """See RouterClient.generate; raises RouterLost when the request found no other router in time."""
        resumable = ResumableRequest(request)
        full: set[int] = set()
        waiting_since_s: float | None = None
        failure: RouterUnavailable | RouterBusy
        while True:
            index = choose_router([m.load() for m in self._members], request.group, full)
            if index is None:
                failure = RouterBusy(1.0)
                full.clear()
                if not resumable.is_begun:
                    raise failure
            else:
                try:
                    async with aclosing(self._events(self._members[index], resumable)) as events:
                        async for event in events:
                            full.clear()
                            waiting_since_s = None
                            yield event
                    return
                except RouterBusy as error:
                    full.add(index)
                    failure = error
                except RouterUnavailable as error:
                    self._note_loss(self._members[index], resumable, error)
                    failure = error
            now_s = self._clock()
            waiting_since_s = now_s if waiting_since_s is None else waiting_since_s
            self._check_hope(resumable, failure, now_s - waiting_since_s)
            if index is None or all(m.lost_at_s is not None for m in self._members):
                await asyncio.sleep(self._limits.retry_s)

    async def _events(self, member: _Member, resumable: ResumableRequest) -> AsyncGenerator[TokenEvent, None]:
        """Of one attempt, to the request's end. Raises RouterBusy, RouterUnavailable or RouterLost."""
        attempt = resumable.attempt()
        member.open[attempt.request_id] = resumable
        self._watch()
        try:
            generated = cast(AsyncGenerator[TokenEvent, None], member.link.generate(attempt))
            async with aclosing(generated) as events:
                async for event in events:
                    if event.is_resumable or event.finish_reason == "cancelled":
                        raise RouterLost(event.error or "it cancelled the request")
                    if resumable.has_moved:
                        self._num_resumed += 1
                        logger.info("request %s goes on in %s", attempt.request_id, member.name)
                    yield resumable.accept(event)
                    if event.finish_reason is not None:
                        return
            raise RouterLost("an answer ended without a finish reason")
        finally:
            del member.open[attempt.request_id]

    def _note_loss(self, member: _Member, resumable: ResumableRequest, error: RouterUnavailable) -> None:
        member.lost_at_s = self._clock()
        is_lost = isinstance(error, RouterLost)
        if is_lost:
            resumable.lose()
        level = (
            logging.WARNING if is_lost else logging.DEBUG
        )  # while a router starts, every request asks again
        logger.log(level, "request %s: %s: %s", resumable.request.request_id, member.name, error)

    def _check_hope(
        self, resumable: ResumableRequest, failure: RouterUnavailable | RouterBusy, waited_s: float
    ) -> None:
        """Raises where the request is not to be asked for again."""
        if not resumable.is_hopeless and waited_s <= self._limits.resume_timeout_s:
            return
        self._num_given_up += resumable.is_begun
        if resumable.is_begun and not isinstance(failure, RouterLost):
            raise RouterLost(f"no other took its request within {waited_s:.0f} s ({failure})") from failure
        raise failure

    def _watch(self) -> None:
        if self._watcher is None or self._watcher.done():
            self._watcher = detached(self._look_after())

    async def _look_after(self) -> None:
        """While there are requests, or routers that are to come back."""
        while any(member.open or member.lost_at_s is not None for member in self._members):
            await asyncio.sleep(self._limits.watch_interval_s)
            await self._look()

    async def _look(self) -> None:
        watched = [member for member in self._members if member.open or member.lost_at_s is not None]
        answers = await asyncio.gather(*(member.link.health() for member in watched))
        now_s = self._clock()
        for member, health in zip(watched, answers, strict=True):
            member.note_health(health.is_ready, now_s)
        loads = [member.load() for member in self._members]
        for index in routers_to_leave(loads, now_s, self._limits.patience_s):
            logger.warning("%s is not ready; its requests leave it", self._members[index].name)
            self._members[index].link.abandon()

    async def feedback(self, answer_id: str, score: float) -> bool:
        """See RouterClient.feedback. Every router is asked: the choices of an answer may be spread."""
        answers = await self._ask(lambda member: member.link.feedback(answer_id, score))
        return any(answer for answer in answers if answer is not None)

    async def health(self) -> RouterHealth:
        """Ready when one of them is."""
        answers = await asyncio.gather(*(member.link.health() for member in self._members))
        return join_health([member.name for member in self._members], answers)

    async def metrics(self) -> str:
        """See RouterClient.metrics; every sample says of which router it is, by number."""
        texts = await self._ask(lambda member: member.link.metrics())
        counts = PoolCounts(
            [len(member.open) for member in self._members],
            [text is not None for text in texts],
            self._num_resumed,
            self._num_given_up,
        )
        return join_metrics(texts) + render_pool(counts)

    async def status(self) -> dict[str, object]:
        """See RouterClient.status and `join_status`."""
        answers = await self._ask(lambda member: member.link.status())
        pairs = zip(self._members, answers, strict=True)
        return join_status([RouterView(member.name, len(member.open), answer) for member, answer in pairs])

    async def _ask(self, ask: Callable[[_Member], Awaitable[T]]) -> list[T | None]:
        """Every router's answer, None of those that do not answer. Raises RouterUnavailable where none does."""
        asked = (ask(member) for member in self._members)
        answers: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failures:
            if len(failures) == len(answers) or not isinstance(failure, RouterUnavailable):
                raise failure
        return [None if isinstance(answer, BaseException) else answer for answer in answers]
