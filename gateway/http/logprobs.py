"""Logprobs in the shapes of both endpoints.

A token that is no whole text by itself (part of a character) is written as OpenAI writes it: `\\xe6\\x97` in a chat,
`bytes:\\xe6\\x97` in a completion. There is an entry for every token that usage counts, the one that ended the answer
included. Called by `gateway.http.answers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from router.request import TokenLogprob

TokenBytes: TypeAlias = Callable[[int], bytes]


@dataclass(frozen=True)
class LoggedToken:
    """A token of a prompt or an answer."""

    token_id: int
    offset: int
    """Characters of the choice's text before it, a prompt that is echoed included."""
    logprob: TokenLogprob | None
    """None for a prompt's first token, which nothing precedes."""


def logged(
    token_ids: Sequence[int], offsets: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> list[LoggedToken]:
    """One for each offset: tokens behind a stop string have none."""
    return [
        LoggedToken(token_id, offset, logprob)
        for token_id, offset, logprob in zip(token_ids, offsets, logprobs, strict=False)
    ]


def completion_logprobs(tokens: Sequence[LoggedToken], token_bytes: TokenBytes) -> dict[str, Any]:
    """The legacy endpoint's parallel lists. A dictionary of alternatives has the token itself, too."""

    def name(token_id: int) -> str:
        return _text(token_bytes(token_id), "bytes:")

    top: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:
            top.append(None)
            continue
        named: dict[str, float] = {}
        for token_id, logprob in (*token.logprob.top, (token.token_id, token.logprob.logprob)):
            named.setdefault(name(token_id), logprob)
        top.append(named)
    return {
        "tokens": [name(token.token_id) for token in tokens],
        "token_logprobs": [token.logprob.logprob if token.logprob else None for token in tokens],
        "top_logprobs": top,
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[LoggedToken], token_bytes: TokenBytes) -> dict[str, Any]:
    """The chat endpoint's list of tokens."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {"token": _text(raw, ""), "logprob": logprob, "bytes": list(raw)}

    content = [
        {
            **entry(token.token_id, token.logprob.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in token.logprob.top],
        }
        for token in tokens
        if token.logprob is not None
    ]
    return {"content": content, "refusal": None}


def _text(raw: bytes, prefix: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)
