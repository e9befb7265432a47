"""Finds calls of tools in an answer's text as it grows. Pure. Called by `gateway.http.pieces`.

What turns out to be no call of a function that was offered, or none that has come to its end, stays text: nothing that
the model wrote is lost.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable

from gateway.errors import ApiError
from gateway.http.request_limits import parse_json
from gateway.http.stream import overlap
from gateway.http.tool_fields import LIMITS, MAX_CALLS, ToolCall
from gateway.http.tool_grammar import CLOSE, OPEN

MAX_CALL_CHARS = 1 << 20
STRING = re.compile(r'"(?:[^"\\\n]|\\.?)*+["\n]')
"""Of JSON, which has no line end in a string: there ends one that a model forgot to close."""


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
        self._begin: int | None = None
        """Where in `_held` a call is open: what precedes its mark is white space."""
        self._seen = 0
        """How far `_held` was searched for the call's end."""
        self._read_to, self._is_in_string = 0, False
        """How far the call was looked through for strings, and whether one is open there."""
        self._is_after_call = False
        """Whether nothing was shown since the last call."""
        self._has_shown = False
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """The text that is certainly shown, and the calls that came to their end. White space around calls is none of
        the text."""
        self._held += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if self._begin is None:
                at = self._held.find(OPEN)
                if at < 0:
                    break
                before = self._held[:at].rstrip()
                shown.append(self._without_gap(before))
                self._held, self._begin = self._held[len(before) :], at - len(before)
                self._seen = self._read_to = self._begin
                self._is_in_string = False
            end = self._find_end()
            if end < 0:
                break
            self._take(end, shown, calls)
        shown.append(self._let_go())
        return "".join(shown), tuple(calls)

    def end(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest, once all text was pushed: a call without its last mark is one."""
        shown: list[str] = []
        calls: list[ToolCall] = []
        if self._begin is not None:
            self._take(len(self._held), shown, calls)
        elif self._held.strip() or not self.num_calls:
            shown.append(self._without_gap(self._held))
        self._held = ""
        return "".join(shown), tuple(calls)

    def _find_end(self) -> int:
        """Where the mark stands that ends the open call, below 0 where it has not come. In a string it is text."""
        while (end := self._held.find(CLOSE, self._seen)) >= 0:
            quote = '"' if self._is_in_string else ""
            self._is_in_string = '"' in STRING.sub("", quote + self._held[self._read_to : end])
            self._read_to = end
            if not self._is_in_string:
                return end
            self._seen = end + 1
        self._seen = max(self._seen, len(self._held) - len(CLOSE) + 1)
        return -1

    def _take(self, end: int, shown: list[str], calls: list[ToolCall]) -> None:
        """Of what is held, all that the mark at `end` closes. Where a mark that opened it was but mentioned, the call
        begins with the last one."""
        whole, self._held = self._held[: end + len(CLOSE)], self._held[end + len(CLOSE) :]
        begin, last = self._begin or 0, whole.rfind(OPEN, 0, end)
        self._begin = None
        call = None
        if self.num_calls < MAX_CALLS:
            call = self._read(whole[begin + len(OPEN) : end])
            if call is None and last > begin and (call := self._read(whole[last + len(OPEN) : end])):
                shown.append(self._without_gap(whole[:last].rstrip()))
        if call is None:
            shown.append(self._without_gap(whole))
        else:
            self.num_calls += 1
            self._is_after_call = True
            calls.append(call)

    def _read(self, body: str) -> ToolCall | None:
        """None where it is no call, or one that could not be sent on, or back, as JSON."""
        try:
            value = parse_json(body.encode(), LIMITS) if len(body) <= MAX_CALL_CHARS else {}
            name, arguments = value.get("name"), value.get("arguments")
            json.dumps(arguments, allow_nan=False)
        except (ApiError, ValueError):
            return None
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return ToolCall(self._new_id(), name, arguments)

    def _let_go(self) -> str:
        """What of the text cannot belong to a call."""
        if self._begin is not None:
            return ""
        kept = self._held[: len(self._held) - overlap(self._held, OPEN)].rstrip()
        self._held = self._held[len(kept) :]
        return self._without_gap(kept)

    def _without_gap(self, text: str) -> str:
        """Text without the white space that stands between it and a call before it; where that stood between two pieces
        of text, they keep a line's end between them."""
        if self._is_after_call:
            text = text.lstrip()
            self._is_after_call = not text
            if text and self._has_shown:
                text = "\n" + text
        self._has_shown = self._has_shown or bool(text)
        return text
