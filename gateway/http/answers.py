"""What clients get: the OpenAI API's answers as JSON values, plain and in chunks.

Our own extension is one object, `sage`, in a plain answer and in a stream's last chunk: the one that has usage, or
else, where the routing was not the plain one, the last with a finish reason. `gateway.http.quality` makes it. Called by
`gateway.http.completions` and `gateway.http.connection`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gateway.http.quality import describe_quality
from gateway.http.speech import SpeechEnd, SpokenForm
from gateway.http.tool_fields import ToolCall
from gateway.media.wav_writing import wav_of
from router.routing_choice import RoutingReport

DONE_EVENT = b"data: [DONE]\n\n"
Logprobs = dict[str, Any] | None
"""As `gateway.http.logprobs` shapes them."""


@dataclass(frozen=True)
class AnswerHead:
    """What every chunk of an answer repeats."""

    answer_id: str
    created: int
    model: str
    system_fingerprint: str | None
    is_chat: bool
    quantization: str | None = None
    """Of the experts that answer; None where they are as published."""


@dataclass(frozen=True)
class ChoiceAnswer:
    """One answer as a whole."""

    text: str
    logprobs: Logprobs
    finish_reason: Literal["stop", "length", "tool_calls"]
    audio: dict[str, Any] | None = None
    """As `whole_audio` shapes it, where the answer is spoken."""
    calls: tuple[ToolCall, ...] = ()
    """Of tools."""


@dataclass(frozen=True)
class Totals:
    """What all answers to a request took."""

    num_prompt_tokens: int
    num_answer_tokens: int
    ttft_s: float
    """From the request's arrival to the first token of any answer; 0 where nothing was generated."""
    tokens_per_s: float
    """Of the tokens that came after each answer's first event; 0 where there are none."""
    reports: tuple[RoutingReport, ...] = ()
    """Of the answers whose routing was not the plain one."""
    is_mixed: bool = False
    """Whether experts of another numerics class took part in any answer."""
    num_cached_tokens: int | None = None
    """Of the prompts' tokens, those that were found computed; None where nobody tells."""
    speech: tuple[SpeechEnd, ...] | None = None
    """Of each answer, where they are spoken."""
    first_sound_s: float = 0.0
    """From the request's arrival to the first samples of any answer; 0 where there are none."""


def plain_answer(head: AnswerHead, choices: Sequence[ChoiceAnswer], totals: Totals) -> dict[str, Any]:
    """The whole answer of either endpoint."""
    kind = "chat.completion" if head.is_chat else "text_completion"
    shown = [_plain_choice(head, index, choice) for index, choice in enumerate(choices)]
    return {**_envelope(head, kind), "choices": shown, **_closing(head, totals)}


def _plain_choice(head: AnswerHead, index: int, choice: ChoiceAnswer) -> dict[str, Any]:
    content: dict[str, Any] = {"text": choice.text}
    if choice.audio is not None:
        content = {"message": {"role": "assistant", "content": None, "refusal": None, "audio": choice.audio}}
    elif head.is_chat:
        text = None if choice.calls and not choice.text else choice.text
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        if choice.calls:
            content["message"]["tool_calls"] = [call.as_json() for call in choice.calls]
    return {"index": index, **content, "logprobs": choice.logprobs, "finish_reason": choice.finish_reason}


def whole_audio(audio_id: str, form: SpokenForm, text: str, samples: bytes) -> dict[str, Any]:
    """What is heard of a plain answer, in place of its content."""
    data = wav_of(samples) if form.format == "wav" else samples
    sound = base64.b64encode(data).decode()
    return {"id": audio_id, "data": sound, "expires_at": form.expires_at, "transcript": text}


def role_chunk(head: AnswerHead, index: int, *, is_spoken: bool = False) -> dict[str, Any]:
    """The first chunk of an answer in a chat's stream."""
    content = {} if is_spoken else {"content": ""}
    return _chunk(head, [_delta(index, {"role": "assistant", **content}, None, None)])


def text_chunk(head: AnswerHead, index: int, text: str, logprobs: Logprobs) -> dict[str, Any]:
    """Some text, and the logprobs of the tokens that came with it."""
    if head.is_chat:
        return _chunk(head, [_delta(index, {"content": text}, logprobs, None)])
    return _chunk(head, [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}])


def call_chunks(head: AnswerHead, index: int, number: int, call: ToolCall) -> Iterator[dict[str, Any]]:
    """A call of a tool: what it is, then its arguments. number: of the answer's calls, from 0."""
    whole = call.as_json()
    arguments = whole["function"]["arguments"]
    whole["function"]["arguments"] = ""
    for part in ({"index": number, **whole}, {"index": number, "function": {"arguments": arguments}}):
        yield _chunk(head, [_delta(index, {"tool_calls": [part]}, None, None)])


def audio_chunk(
    head: AnswerHead, index: int, audio: dict[str, Any], logprobs: Logprobs = None
) -> dict[str, Any]:
    """Some of a spoken answer: fields of its `audio`, of which `transcript` and `data` are to be joined."""
    return _chunk(head, [_delta(index, {"audio": audio}, logprobs, None)])


def sound_data(samples: bytes) -> str:
    """Of a stream: samples without a head."""
    return base64.b64encode(samples).decode()


def end_chunk(head: AnswerHead, index: int, finish_reason: str) -> dict[str, Any]:
    """The chunk with an answer's finish reason."""
    if head.is_chat:
        return _chunk(head, [_delta(index, {}, None, finish_reason)])
    return _chunk(head, [{"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}])


def with_quality(
    head: AnswerHead,
    chunk: dict[str, Any],
    reports: Sequence[RoutingReport],
    is_mixed: bool,
    speech: Sequence[SpeechEnd] | None,
) -> dict[str, Any]:
    """The last chunk with choices of a stream without usage: only this one can say that the answer is modified, explain
    it, or tell how much was spoken. A plain answer's is left as OpenAI has it."""
    if not reports and head.quantization is None and not is_mixed and speech is None:
        return chunk
    quality = describe_quality(reports, head.quantization, is_mixed=is_mixed)
    return {**chunk, "sage": quality | _speech(speech)}


def usage_chunk(head: AnswerHead, totals: Totals) -> dict[str, Any]:
    """The last chunk where the client asked for usage; it has no choices."""
    return {**_chunk(head, []), **_closing(head, totals)}


def encode_event(value: object) -> bytes:
    """One server-sent event. JSON escapes line ends, so the value stays on its line."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _chunk(head: AnswerHead, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if head.is_chat else "text_completion"
    return {**_envelope(head, kind), "choices": choices}


def _delta(
    index: int, delta: dict[str, Any], logprobs: Logprobs, finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _envelope(head: AnswerHead, kind: str) -> dict[str, Any]:
    return {
        "id": head.answer_id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


def _closing(head: AnswerHead, totals: Totals) -> dict[str, Any]:
    prompt, answer = totals.num_prompt_tokens, totals.num_answer_tokens
    timings = {"ttft_s": round(totals.ttft_s, 6), "tokens_per_s": round(totals.tokens_per_s, 3)}
    quality = describe_quality(totals.reports, head.quantization, is_mixed=totals.is_mixed)
    details = {}
    if totals.speech is not None:
        num_frames = sum(end.num_frames for end in totals.speech)
        answer += num_frames
        details = {"completion_tokens_details": {"audio_tokens": num_frames}}
        timings["first_sound_s"] = round(totals.first_sound_s, 6)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        **details,
    }
    if totals.num_cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": totals.num_cached_tokens}
    return {
        "usage": usage,
        "sage": {**quality, **_speech(totals.speech), "timings": timings},
    }


def _speech(ends: Sequence[SpeechEnd] | None) -> dict[str, Any]:
    """Of each answer how much was spoken, and whether to its end."""
    if ends is None:
        return {}
    return {
        "speech": [
            {"frames": end.num_frames, "seconds": round(end.seconds, 3), "finish_reason": end.finish_reason}
            for end in ends
        ]
    }
