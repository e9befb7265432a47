"""Runs one job at the router and yields its answers, in pieces or whole.

Closing a generator of this module closes those of `gateway.http.pieces`, which cancels the requests at the router.
Called by `gateway.http.app`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from gateway.http.answers import (
    DONE_EVENT,
    ChoiceAnswer,
    Logprobs,
    Totals,
    audio_chunk,
    call_chunks,
    encode_event,
    end_chunk,
    plain_answer,
    role_chunk,
    sound_data,
    text_chunk,
    usage_chunk,
    whole_audio,
    with_quality,
)
from gateway.http.jobs import ChoiceJob, Job
from gateway.http.logprobs import LoggedToken, chat_logprobs, completion_logprobs
from gateway.http.merge import merged
from gateway.http.metrics import GatewayMetrics
from gateway.http.pieces import Backend, Ending, Piece, called_pieces, spoken_pieces, text_pieces
from gateway.http.speech import SpeechEnd
from gateway.http.token_clock import TokenClock, join_clocks
from gateway.http.tool_fields import ToolCall
from router.routing_choice import RoutingReport

MOST_PIECE_BYTES = 96_000
"""Of samples in one event of a stream: two seconds."""


@dataclass
class _Answer:
    """One answer while it grows."""

    texts: list[str] = field(default_factory=list)
    tokens: list[LoggedToken] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    samples: bytearray = field(default_factory=bytearray)
    finish_reason: Ending = "length"

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.tokens.extend(piece.tokens)
        self.calls.extend(piece.calls)
        self.samples += piece.samples
        self.finish_reason = piece.finish_reason or self.finish_reason


@dataclass
class _Tally:
    """What all answers of a job come to."""

    job: Job
    num_tokens: int = 0
    num_cached: int = 0
    num_ended: int = 0
    is_mixed: bool = False
    reports: list[RoutingReport] = field(default_factory=list)
    ends: dict[int, SpeechEnd] = field(default_factory=dict)
    first_sound_s: float = 0.0

    def note(self, piece: Piece, metrics: GatewayMetrics) -> None:
        if piece.samples and not self.first_sound_s:
            self.first_sound_s = time.perf_counter() - self.job.started_at
            metrics.time_to_first_sound.observe(self.first_sound_s)
        if piece.finish_reason is None:
            return
        self.num_ended += 1
        self.num_tokens += piece.num_tokens
        self.num_cached += piece.num_cached
        self.is_mixed |= piece.is_mixed
        if piece.routing is not None:
            self.reports.append(piece.routing)
        if piece.speech is not None:
            self.ends[piece.index] = piece.speech

    @property
    def is_last(self) -> bool:
        return self.num_ended == len(self.job.choices)

    @property
    def speech(self) -> tuple[SpeechEnd, ...] | None:
        """By the answers' numbers."""
        return None if self.job.speech is None else tuple(self.ends[index] for index in sorted(self.ends))

    def totals(self, clocks: Sequence[TokenClock]) -> Totals:
        ttft_s, tokens_per_s = join_clocks(clocks)
        return Totals(
            self.job.num_prompt_tokens,
            self.num_tokens,
            ttft_s,
            tokens_per_s,
            tuple(self.reports),
            self.is_mixed,
            self.num_cached,
            self.speech,
            self.first_sound_s,
        )


async def whole_answer(job: Job, backend: Backend) -> dict[str, Any]:
    """The plain answer. Raises RouterBusy, RouterUnavailable, GenerationFailed."""
    answers = [_Answer() for _ in job.choices]
    clocks, tally = _clocks(job, backend), _Tally(job)
    with backend.room.taken(job.sound_bytes, job.choices[0].request.owner):
        async with aclosing(_pieces(job, backend, clocks)) as pieces:
            async for piece in pieces:
                answers[piece.index].add(piece)
                tally.note(piece, backend.metrics)
        choices = [_choice(job, choice, answers[choice.index], backend) for choice in job.choices]
    return plain_answer(job.head, choices, tally.totals(clocks))


async def answer_events(job: Job, backend: Backend) -> AsyncGenerator[bytes, None]:
    """The streamed answer as server-sent events. Raises like `whole_answer`; nothing is yielded before the
    router has taken a request and answered."""
    clocks, tally = _clocks(job, backend), _Tally(job)
    begun: set[int] = set()
    num_calls: Counter[int] = Counter()
    with backend.room.taken(job.sound_bytes, job.choices[0].request.owner):
        async with aclosing(_pieces(job, backend, clocks)) as pieces:
            async for piece in pieces:
                tally.note(piece, backend.metrics)
                if job.head.is_chat and piece.index not in begun:
                    begun.add(piece.index)
                    yield encode_event(role_chunk(job.head, piece.index, is_spoken=job.speech is not None))
                for chunk in _chunks(job, piece, backend):
                    yield encode_event(chunk)
                for call in piece.calls:
                    for chunk in call_chunks(job.head, piece.index, num_calls[piece.index], call):
                        yield encode_event(chunk)
                    num_calls[piece.index] += 1
                if piece.finish_reason is not None:
                    end = end_chunk(job.head, piece.index, piece.finish_reason)
                    if tally.is_last and not job.has_usage_chunk:
                        end = with_quality(job.head, end, tally.reports, tally.is_mixed, tally.speech)
                    yield encode_event(end)
    if job.has_usage_chunk:
        yield encode_event(usage_chunk(job.head, tally.totals(clocks)))
    yield DONE_EVENT


def _choice(job: Job, choice: ChoiceJob, answer: _Answer, backend: Backend) -> ChoiceAnswer:
    text = "".join(answer.texts)
    audio = None
    if job.speech is not None and choice.audio_id is not None:
        audio = whole_audio(choice.audio_id, job.speech, text, bytes(answer.samples))
    logprobs = _logprobs(job, backend, answer.tokens)
    return ChoiceAnswer(text, logprobs, answer.finish_reason, audio, tuple(answer.calls))


def _chunks(job: Job, piece: Piece, backend: Backend) -> Iterator[dict[str, Any]]:
    """Of a stream, what a piece brings beside an end."""
    audio_id = job.choices[piece.index].audio_id
    if piece.text or piece.tokens:
        logprobs = _logprobs(job, backend, piece.tokens) if piece.tokens else None
        if audio_id is None:
            yield text_chunk(job.head, piece.index, piece.text, logprobs)
        else:
            yield audio_chunk(job.head, piece.index, {"id": audio_id, "transcript": piece.text}, logprobs)
    for begin in range(0, len(piece.samples), MOST_PIECE_BYTES):
        data = sound_data(piece.samples[begin : begin + MOST_PIECE_BYTES])
        yield audio_chunk(job.head, piece.index, {"id": audio_id, "data": data})
    if piece.speech is not None and job.speech is not None:
        yield audio_chunk(job.head, piece.index, {"expires_at": job.speech.expires_at})


def _clocks(job: Job, backend: Backend) -> list[TokenClock]:
    return [TokenClock(job.started_at, backend.metrics) for _ in job.choices]


def _logprobs(job: Job, backend: Backend, tokens: Sequence[LoggedToken]) -> Logprobs:
    if job.choices[0].request.num_logprobs is None:
        return None
    shape = chat_logprobs if job.head.is_chat else completion_logprobs
    return shape(tokens, backend.tokenizer.token_bytes)


def _pieces(job: Job, backend: Backend, clocks: Sequence[TokenClock]) -> AsyncGenerator[Piece, None]:
    """Of all answers, as they come."""
    backend.metrics.prompt_tokens.inc(job.num_prompt_tokens)
    return merged([_pieces_of(job, choice, backend, clocks[choice.index]) for choice in job.choices])


def _pieces_of(
    job: Job, choice: ChoiceJob, backend: Backend, clock: TokenClock
) -> AsyncGenerator[Piece, None]:
    if job.speech is not None:
        return spoken_pieces(job, choice, backend, clock)
    if job.calling is not None:
        return called_pieces(job, choice, backend, clock)
    return text_pieces(job, choice, backend, clock)
