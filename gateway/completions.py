"""Runs one job at the router and yields its answer, in pieces or whole.

Closing a generator of this module closes the router's, which cancels the request there. Called by
`gateway.http_app`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, cast

from gateway.answers import (
    DONE_EVENT,
    Outcome,
    encode_event,
    end_chunk,
    plain_answer,
    role_chunk,
    text_chunk,
    usage_chunk,
)
from gateway.errors import GenerationFailed, RouterUnavailable
from gateway.http_metrics import GatewayMetrics
from gateway.jobs import Job
from gateway.router_client import RouterClient
from gateway.stream import AnswerText
from gateway.tokenizer import TextTokenizer
from router.request import TokenEvent


@dataclass(frozen=True)
class Backend:
    """What a job needs to run."""

    client: RouterClient
    tokenizer: TextTokenizer
    metrics: GatewayMetrics


async def whole_answer(job: Job, backend: Backend) -> dict[str, Any]:
    """The plain answer. Raises RouterBusy, RouterUnavailable, GenerationFailed."""
    pieces: list[str] = []
    async with aclosing(_generate(job, backend)) as generation:
        async for piece in generation:
            if isinstance(piece, Outcome):
                return plain_answer(job.head, "".join(pieces), piece)
            pieces.append(piece)
    raise AssertionError("a generation ends with its outcome")


async def answer_events(job: Job, backend: Backend) -> AsyncGenerator[bytes, None]:
    """The streamed answer as server-sent events. Raises like `whole_answer`; nothing is yielded before the
    router has taken the request and answered."""
    is_first = True
    async with aclosing(_generate(job, backend)) as generation:
        async for piece in generation:
            if is_first and job.head.is_chat:
                yield encode_event(role_chunk(job.head))
            is_first = False
            if isinstance(piece, Outcome):
                yield encode_event(end_chunk(job.head, piece))
                if job.has_usage_chunk:
                    yield encode_event(usage_chunk(job.head, piece))
            elif piece:
                yield encode_event(text_chunk(job.head, piece))
    yield DONE_EVENT


async def _generate(job: Job, backend: Backend) -> AsyncGenerator[str | Outcome, None]:
    """Pieces of text, some of them empty, then the outcome."""
    text = AnswerText(backend.tokenizer.detokenizer(), job.request.sampling.stop_token_ids, job.stops)
    clock = _TokenClock(job.started_at, backend.metrics)
    backend.metrics.prompt_tokens.inc(len(job.request.prompt_ids))
    reason: Literal["stop", "length"] | None = None
    events = cast(AsyncGenerator[TokenEvent, None], backend.client.generate(job.request))
    async with aclosing(events):
        async for event in events:
            num_before = text.num_tokens
            piece = text.push(event.token_ids)
            clock.note(text.num_tokens - num_before)
            reason = "stop" if text.is_stopped else _finish_reason(event)
            if reason is not None:
                break
            yield piece
    if reason is None:
        raise RouterUnavailable("its answer ended without a finish reason")
    yield piece + text.flush()
    if text.is_stopped:
        reason = "stop"
    yield Outcome(reason, len(job.request.prompt_ids), text.num_tokens, clock.ttft_s, clock.tokens_per_s)


def _finish_reason(event: TokenEvent) -> Literal["stop", "length"] | None:
    if event.finish_reason == "error":
        raise GenerationFailed(event.error or "the router gave no reason")
    if event.finish_reason == "cancelled":
        raise RouterUnavailable("it cancelled the request")
    return event.finish_reason


class _TokenClock:
    """When the tokens of one answer came; also feeds the metrics."""

    def __init__(self, started_at: float, metrics: GatewayMetrics) -> None:
        self._started_at, self._metrics = started_at, metrics
        self._first_at = self._last_at = started_at
        self._num_tokens = self._num_first = 0

    def note(self, num_tokens: int) -> None:
        """Tokens that came together, now; the time between them counts as equal."""
        if not num_tokens:
            return
        now = time.perf_counter()
        self._metrics.answer_tokens.inc(num_tokens)
        if not self._num_tokens:
            self._first_at, self._num_first = now, num_tokens
            self._metrics.time_to_first_token.observe(now - self._started_at)
        else:
            for _ in range(num_tokens):
                self._metrics.time_between_tokens.observe((now - self._last_at) / num_tokens)
        self._last_at = now
        self._num_tokens += num_tokens

    @property
    def ttft_s(self) -> float:
        return self._first_at - self._started_at

    @property
    def tokens_per_s(self) -> float:
        duration_s = self._last_at - self._first_at
        return (self._num_tokens - self._num_first) / duration_s if duration_s > 0.0 else 0.0
