"""Runs one job at the router and yields its answers, in pieces or whole.

Closing a generator of this module closes the router's, which cancels the requests there. Called by
`gateway.http.app`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from gateway.errors import GenerationFailed, RouterUnavailable
from gateway.http.answers import (
    DONE_EVENT,
    ChoiceAnswer,
    Logprobs,
    Totals,
    encode_event,
    end_chunk,
    plain_answer,
    role_chunk,
    text_chunk,
    usage_chunk,
    with_quality,
)
from gateway.http.jobs import ChoiceJob, Job
from gateway.http.logprobs import LoggedToken, chat_logprobs, completion_logprobs, logged
from gateway.http.merge import merged
from gateway.http.metrics import GatewayMetrics
from gateway.http.stream import AnswerText
from gateway.http.token_clock import TokenClock, join_clocks
from gateway.routers.client import RouterClient
from gateway.text.tokenizer import TextTokenizer
from router.request import TokenEvent
from router.routing_choice import RoutingReport


@dataclass(frozen=True)
class Backend:
    """What a job needs to run."""

    client: RouterClient
    tokenizer: TextTokenizer
    metrics: GatewayMetrics


@dataclass(frozen=True)
class Piece:
    """Progress of one answer."""

    index: int
    text: str
    tokens: Sequence[LoggedToken] = ()
    """Those that came with this piece, where logprobs are asked for."""
    finish_reason: Literal["stop", "length"] | None = None
    """In the answer's last piece."""
    num_tokens: int = 0
    """Tokens of the whole answer, in its last piece."""
    routing: RoutingReport | None = None
    """Of the whole answer, in its last piece, where its routing was not the plain one."""
    is_mixed: bool = False
    """See TokenEvent.is_mixed; of the whole answer, in its last piece."""
    num_cached: int = 0
    """Of the prompt's tokens, those that the first answer to it found computed; in the last piece."""


@dataclass
class _Answer:
    """One answer while it grows."""

    texts: list[str] = field(default_factory=list)
    tokens: list[LoggedToken] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"


async def whole_answer(job: Job, backend: Backend) -> dict[str, Any]:
    """The plain answer. Raises RouterBusy, RouterUnavailable, GenerationFailed."""
    answers = [_Answer() for _ in job.choices]
    clocks = _clocks(job, backend)
    num_tokens = num_cached = 0
    is_mixed = False
    reports: list[RoutingReport] = []
    async with aclosing(_pieces(job, backend, clocks)) as pieces:
        async for piece in pieces:
            answer = answers[piece.index]
            answer.texts.append(piece.text)
            answer.tokens.extend(piece.tokens)
            num_tokens += piece.num_tokens
            reports.extend(_reports(piece))
            is_mixed |= piece.is_mixed
            num_cached += piece.num_cached
            answer.finish_reason = piece.finish_reason or answer.finish_reason
    choices = [
        ChoiceAnswer("".join(answer.texts), _logprobs(job, backend, answer.tokens), answer.finish_reason)
        for answer in answers
    ]
    return plain_answer(job.head, choices, _totals(job, clocks, num_tokens, reports, is_mixed, num_cached))


async def answer_events(job: Job, backend: Backend) -> AsyncGenerator[bytes, None]:
    """The streamed answer as server-sent events. Raises like `whole_answer`; nothing is yielded before the
    router has taken a request and answered."""
    clocks = _clocks(job, backend)
    num_tokens = num_ended = num_cached = 0
    is_mixed = False
    reports: list[RoutingReport] = []
    begun: set[int] = set()
    async with aclosing(_pieces(job, backend, clocks)) as pieces:
        async for piece in pieces:
            if job.head.is_chat and piece.index not in begun:
                begun.add(piece.index)
                yield encode_event(role_chunk(job.head, piece.index))
            if piece.text or piece.tokens:
                logprobs = _logprobs(job, backend, piece.tokens) if piece.tokens else None
                yield encode_event(text_chunk(job.head, piece.index, piece.text, logprobs))
            if piece.finish_reason is not None:
                num_tokens += piece.num_tokens
                num_ended += 1
                reports.extend(_reports(piece))
                is_mixed |= piece.is_mixed
                num_cached += piece.num_cached
                end = end_chunk(job.head, piece.index, piece.finish_reason)
                is_last = num_ended == len(job.choices) and not job.has_usage_chunk
                yield encode_event(with_quality(job.head, end, reports, is_mixed) if is_last else end)
    if job.has_usage_chunk:
        totals = _totals(job, clocks, num_tokens, reports, is_mixed, num_cached)
        yield encode_event(usage_chunk(job.head, totals))
    yield DONE_EVENT


def _clocks(job: Job, backend: Backend) -> list[TokenClock]:
    return [TokenClock(job.started_at, backend.metrics) for _ in job.choices]


def _totals(
    job: Job,
    clocks: Sequence[TokenClock],
    num_tokens: int,
    reports: Sequence[RoutingReport],
    is_mixed: bool,
    num_cached: int,
) -> Totals:
    ttft_s, tokens_per_s = join_clocks(clocks)
    return Totals(
        job.num_prompt_tokens, num_tokens, ttft_s, tokens_per_s, tuple(reports), is_mixed, num_cached
    )


def _reports(piece: Piece) -> tuple[RoutingReport, ...]:
    return () if piece.routing is None else (piece.routing,)


def _logprobs(job: Job, backend: Backend, tokens: Sequence[LoggedToken]) -> Logprobs:
    if job.choices[0].request.num_logprobs is None:
        return None
    shape = chat_logprobs if job.head.is_chat else completion_logprobs
    return shape(tokens, backend.tokenizer.token_bytes)


def _pieces(job: Job, backend: Backend, clocks: Sequence[TokenClock]) -> AsyncGenerator[Piece, None]:
    """Of all answers, as they come."""
    backend.metrics.prompt_tokens.inc(job.num_prompt_tokens)
    return merged([_generate(job, choice, backend, clocks[choice.index]) for choice in job.choices])


async def _generate(
    job: Job, choice: ChoiceJob, backend: Backend, clock: TokenClock
) -> AsyncGenerator[Piece, None]:
    """One answer."""
    request = choice.request
    text = AnswerText(
        backend.tokenizer.detokenizer(has_special=choice.is_echoed),
        {*request.sampling.stop_token_ids, *backend.tokenizer.special_tokens},
        job.stops,
        min_tokens=request.sampling.min_tokens,
    )
    must_echo = choice.is_echoed
    routing: RoutingReport | None = None
    is_mixed = False
    num_cached: int | None = None
    events = cast(AsyncGenerator[TokenEvent, None], backend.client.generate(request))
    async with aclosing(events):
        async for event in events:
            failure = _failure(event)
            if failure is not None:
                raise failure
            if event.routing is not None:
                routing = event.routing.after(routing)
            is_mixed |= event.is_mixed
            if num_cached is None:  # a router that takes over finds something else, and is not asked
                num_cached = 0 if request.sampling.choice else event.num_cached
            if must_echo:
                must_echo = False
                shown, offsets = text.echo(request.prompt_ids)
                yield Piece(choice.index, shown, logged(request.prompt_ids, offsets, event.prompt_logprobs))
            num_before = text.num_tokens
            shown, offsets = text.take(event.token_ids)
            clock.note(text.num_tokens - num_before)
            tokens = logged(event.token_ids, offsets, event.logprobs)
            if text.is_stopped or event.finish_reason is not None:
                break
            yield Piece(choice.index, shown, tokens)
        else:
            raise RouterUnavailable("its answer ended without a finish reason")
    shown += text.flush()
    is_stopped = text.is_stopped or event.finish_reason == "stop"
    reason: Literal["stop", "length"] = "stop" if is_stopped else "length"
    yield Piece(choice.index, shown, tokens, reason, text.num_tokens, routing, is_mixed, num_cached or 0)


def _failure(event: TokenEvent) -> Exception | None:
    if event.finish_reason == "error":
        return GenerationFailed(event.error or "the router gave no reason")
    if event.finish_reason == "cancelled":
        return RouterUnavailable("it cancelled the request")
    return None
