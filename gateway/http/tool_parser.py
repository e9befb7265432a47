"""Finds calls of tools in an answer's text as it grows. Pure. Called by `gateway.http.pieces`.

What turns out to be no call of a function that was offered, or none that has come to its end, stays text: nothing that
the model wrote is lost.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from gateway.http.stream import overlap
from gateway.http.tool_fields import MAX_CALLS, ToolCall
from gateway.http.tool_grammar import CLOSE, OPEN

MAX_CALL_CHARS = 1 << 20


def new_call_id() -> str:
    """As OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolParser:
    """The state of one answer."""

    def __init__(self, names: Iterable[str], new_id: Callable[[], str]) -> None:
        """names: of functions that were offered. new_id: of a call."""
        self._names, self._new_id = frozenset(names), new_id
        self._held = ""
        """What may be white space before a call, the beginning of one, or all of one that is not complete."""
        self._is_open = False
        """Whether `_held` begins with the mark that opens a call."""
        self._is_after_call = False
        """Whether nothing was shown since the last call."""
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """The text that is certainly shown, and the calls that came to their end. White space around calls is none of
        the text."""
        self._held += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if not self._is_open:
                at = self._held.find(OPEN)
                if at < 0:
                    break
                shown.append(self._without_gap(self._held[:at].rstrip()))
                self._held, self._is_open = self._held[at:], True
            end = self._held.find(CLOSE)
            if end < 0:
                break
            body, self._is_open = self._held[len(OPEN) : end], False
            self._take(body, shown, calls, self._held[: end + len(CLOSE)])
            self._held = self._held[end + len(CLOSE) :]
        shown.append(self._let_go())
        return "".join(shown), tuple(calls)

    def end(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest, once all text was pushed: a call without its last mark is one."""
        shown: list[str] = []
        calls: list[ToolCall] = []
        if self._is_open:
            self._take(self._held[len(OPEN) :], shown, calls, self._held)
        elif self._held.strip() or not self.num_calls:
            shown.append(self._without_gap(self._held))
        self._held, self._is_open = "", False
        return "".join(shown), tuple(calls)

    def _take(self, body: str, shown: list[str], calls: list[ToolCall], whole: str) -> None:
        call = self._read(body)
        if call is None or self.num_calls == MAX_CALLS:
            shown.append(whole)
            self._is_after_call = False
        else:
            self.num_calls += 1
            self._is_after_call = True
            calls.append(call)

    def _read(self, body: str) -> ToolCall | None:
        try:
            value: Any = json.loads(body) if len(body) <= MAX_CALL_CHARS else None
        except (ValueError, RecursionError):
            return None
        name, arguments = (
            (value.get("name"), value.get("arguments")) if isinstance(value, dict) else (None, None)
        )
        if name not in self._names or not isinstance(arguments, dict):
            return None
        return ToolCall(self._new_id(), name, arguments)

    def _let_go(self) -> str:
        """What of the text cannot belong to a call."""
        if self._is_open:
            return ""
        kept = self._held[: len(self._held) - overlap(self._held, OPEN)].rstrip()
        self._held = self._held[len(kept) :]
        return self._without_gap(kept)

    def _without_gap(self, text: str) -> str:
        """Text without the white space that stands between it and a call before it."""
        if self._is_after_call:
            text = text.lstrip()
            self._is_after_call = not text
        return text
