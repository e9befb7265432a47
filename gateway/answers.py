"""What clients get: the OpenAI API's answers as JSON values, plain and in chunks.

Our own extension is one object, `sage`, in a plain answer and in the last chunk that has usage. Called by
`gateway.completions` and `gateway.connection`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

DONE_EVENT = b"data: [DONE]\n\n"
ROUTING_QUALITY = "exact"
"""Native routing: the published model's own."""


@dataclass(frozen=True)
class AnswerHead:
    """What every chunk of an answer repeats."""

    answer_id: str
    created: int
    model: str
    system_fingerprint: str | None
    is_chat: bool


@dataclass(frozen=True)
class Outcome:
    """How a generation ended and what it took."""

    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_answer_tokens: int
    ttft_s: float
    """From the request's arrival to the first token."""
    tokens_per_s: float
    """Of the tokens that came after the first event; 0 where there are none."""


def plain_answer(head: AnswerHead, text: str, outcome: Outcome) -> dict[str, Any]:
    """The whole answer of either endpoint."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": outcome.finish_reason}
    if head.is_chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    kind = "chat.completion" if head.is_chat else "text_completion"
    return {**_envelope(head, kind), "choices": [choice], **_closing(outcome)}


def role_chunk(head: AnswerHead) -> dict[str, Any]:
    """The first chunk of a chat's stream."""
    return _chunk(head, [_delta({"role": "assistant", "content": ""}, None)])


def text_chunk(head: AnswerHead, text: str) -> dict[str, Any]:
    """Some text."""
    if head.is_chat:
        return _chunk(head, [_delta({"content": text}, None)])
    return _chunk(head, [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}])


def end_chunk(head: AnswerHead, outcome: Outcome) -> dict[str, Any]:
    """The chunk with the finish reason."""
    if head.is_chat:
        return _chunk(head, [_delta({}, outcome.finish_reason)])
    return _chunk(head, [{"index": 0, "text": "", "logprobs": None, "finish_reason": outcome.finish_reason}])


def usage_chunk(head: AnswerHead, outcome: Outcome) -> dict[str, Any]:
    """The last chunk where the client asked for usage; it has no choices."""
    return {**_chunk(head, []), **_closing(outcome)}


def encode_event(value: object) -> bytes:
    """One server-sent event. JSON escapes line ends, so the value stays on its line."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _chunk(head: AnswerHead, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if head.is_chat else "text_completion"
    return {**_envelope(head, kind), "choices": choices}


def _delta(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _envelope(head: AnswerHead, kind: str) -> dict[str, Any]:
    return {
        "id": head.answer_id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


def _closing(outcome: Outcome) -> dict[str, Any]:
    prompt, answer = outcome.num_prompt_tokens, outcome.num_answer_tokens
    timings = {"ttft_s": round(outcome.ttft_s, 6), "tokens_per_s": round(outcome.tokens_per_s, 3)}
    return {
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
        "sage": {"quality": ROUTING_QUALITY, "timings": timings},
    }
