"""What comes of one answer at a router, piece by piece: its text, then, where it is spoken, how that sounds.

Closing a generator of this module closes the router's, which cancels the request there. Called by
`gateway.http.completions`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from gateway.errors import GenerationFailed, RouterBusy, RouterUnavailable
from gateway.http.answer_room import AnswerRoom
from gateway.http.jobs import ChoiceJob, Job
from gateway.http.logprobs import LoggedToken, logged
from gateway.http.metrics import GatewayMetrics
from gateway.http.speech import SpeechEnd, SpokenReply, speech_request
from gateway.http.spoken_answers import SpokenAnswers
from gateway.http.stream import AnswerText
from gateway.http.token_clock import TokenClock
from gateway.http.tool_fields import ToolCall
from gateway.http.tool_parser import ToolParser, new_call_id
from gateway.routers.client import RouterClient
from gateway.text.tokenizer import TextTokenizer
from router.request import GenerationRequest, TokenEvent
from router.routing_choice import RoutingReport

Ending = Literal["stop", "length", "tool_calls"]
BUSY_PATIENCE_S = 60.0
"""How long a text waits for a router with room for its speech."""


@dataclass(frozen=True)
class Backend:
    """What a job needs to run."""

    client: RouterClient
    tokenizer: TextTokenizer
    metrics: GatewayMetrics
    spoken: SpokenAnswers = field(default_factory=SpokenAnswers)
    room: AnswerRoom = field(default_factory=AnswerRoom)


@dataclass(frozen=True)
class Piece:
    """Progress of one answer."""

    index: int
    text: str = ""
    tokens: Sequence[LoggedToken] = ()
    """Those that came with this piece, where logprobs are asked for."""
    finish_reason: Ending | None = None
    """In the answer's last piece."""
    num_tokens: int = 0
    """Tokens of the whole text, in its last piece."""
    routing: RoutingReport | None = None
    """Of the whole answer, in its last piece, where its routing was not the plain one."""
    is_mixed: bool = False
    """See TokenEvent.is_mixed; of the whole answer, in its last piece."""
    num_cached: int = 0
    """Of the prompt's tokens, those that the first answer to it found computed; in the last piece."""
    calls: tuple[ToolCall, ...] = ()
    """Of tools, that came to their end."""
    samples: bytes = b""
    """Of what is spoken; see `router.speech.wish`."""
    speech: SpeechEnd | None = None
    """In the last piece of an answer that is spoken."""


async def text_pieces(
    job: Job,
    choice: ChoiceJob,
    backend: Backend,
    clock: TokenClock,
    reply: SpokenReply | None = None,
) -> AsyncGenerator[Piece, None]:
    """Of one answer's text. reply: notes what of it is to be spoken."""
    request = choice.request
    text = AnswerText(
        backend.tokenizer.detokenizer(has_special=choice.is_echoed),
        _silent_ids(request, backend),
        job.stops,
        min_tokens=request.sampling.min_tokens,
    )
    must_echo = choice.is_echoed
    routing: RoutingReport | None = None
    is_mixed = False
    num_cached: int | None = None
    async with aclosing(_events(request, backend)) as events:
        async for event in events:
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
            if reply is not None:
                reply.note(shown, event.token_ids, offsets)
            if text.is_stopped or event.finish_reason is not None:
                break
            yield Piece(choice.index, shown, tokens)
    rest = text.flush()
    if reply is not None:
        reply.end(rest, text.num_chars)
    is_stopped = text.is_stopped or event.finish_reason == "stop"
    reason: Ending = "stop" if is_stopped else "length"
    yield Piece(
        choice.index, shown + rest, tokens, reason, text.num_tokens, routing, is_mixed, num_cached or 0
    )


async def called_pieces(
    job: Job, choice: ChoiceJob, backend: Backend, clock: TokenClock
) -> AsyncGenerator[Piece, None]:
    """Of one answer that may call tools: its text without the calls, and these."""
    assert job.calling is not None
    parser = ToolParser(job.calling.names, new_call_id)
    async with aclosing(text_pieces(job, choice, backend, clock)) as pieces:
        async for piece in pieces:
            text, calls = parser.push(piece.text)
            reason = piece.finish_reason
            if reason is not None:
                rest, last_calls = parser.end()
                text, calls = text + rest, (*calls, *last_calls)
                reason = "tool_calls" if reason == "stop" and parser.num_calls else reason
            yield replace(piece, text=text, calls=calls, finish_reason=reason)


async def spoken_pieces(
    job: Job, choice: ChoiceJob, backend: Backend, clock: TokenClock
) -> AsyncGenerator[Piece, None]:
    """Of one answer that is spoken: its text's, those with samples, and its end, "length" where either was cut."""
    assert job.speech is not None and choice.audio_id is not None
    reply = SpokenReply(_silent_ids(choice.request, backend), backend.tokenizer.encode_plain)
    last: Piece | None = None
    async with aclosing(text_pieces(job, choice, backend, clock, reply)) as pieces:
        async for piece in pieces:
            last = piece
            yield Piece(piece.index, piece.text, piece.tokens)
    assert last is not None and last.finish_reason is not None
    end, is_mixed = SpeechEnd(), last.is_mixed
    if reply.ids:
        asked = speech_request(choice.request, job.speech.delivery, reply.ids)
        async with aclosing(_speech_events(asked, backend)) as events:
            async for event in events:
                end = end.after(event)
                is_mixed |= event.is_mixed
                yield Piece(choice.index, samples=event.samples)
    owner = choice.request.owner
    backend.spoken.keep(choice.audio_id, owner, reply.text, job.speech.expires_at)
    reason = last.finish_reason if last.finish_reason == "length" else end.finish_reason
    yield replace(last, text="", tokens=(), finish_reason=reason, is_mixed=is_mixed, speech=end)


async def _speech_events(request: GenerationRequest, backend: Backend) -> AsyncGenerator[TokenEvent, None]:
    """As `_events`. Where routers are full it is asked for again: its text is computed, and would be lost."""
    clock = asyncio.get_running_loop().time
    until_s = clock() + BUSY_PATIENCE_S
    while True:
        try:
            async with aclosing(_events(request, backend)) as events:
                async for event in events:
                    yield event
            return
        except RouterBusy as error:
            if clock() >= until_s:
                raise
            await asyncio.sleep(error.retry_after_s)


async def _events(request: GenerationRequest, backend: Backend) -> AsyncGenerator[TokenEvent, None]:
    """To the one with a finish reason, stop or length. Raises what a router's failure means."""
    generated = cast(AsyncGenerator[TokenEvent, None], backend.client.generate(request))
    async with aclosing(generated) as events:
        async for event in events:
            if event.finish_reason == "error":
                raise GenerationFailed(event.error or "the router gave no reason")
            if event.finish_reason == "cancelled":
                raise RouterUnavailable("it cancelled the request")
            yield event
            if event.finish_reason is not None:
                return
    raise RouterUnavailable("its answer ended without a finish reason")


def _silent_ids(request: GenerationRequest, backend: Backend) -> frozenset[int]:
    return frozenset((*request.sampling.stop_token_ids, *backend.tokenizer.special_tokens))
