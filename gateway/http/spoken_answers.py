"""The texts of answers that were spoken lately, by the ids of their sound: a client may send only this back in a later
turn. Kept by the gateway, on its event loop, within bounds. Called by `gateway.http.jobs` and `gateway.http.pieces`."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.errors import ApiError
from gateway.http.openai_types import Message

MOST_KEPT = 4096
MOST_KEPT_CHARS = 8 << 20
"""Of all texts; the oldest go first. Also of those that one request names."""


@dataclass(frozen=True)
class _Kept:
    owner: str
    text: str
    expires_at: float


class SpokenAnswers:
    """Of one gateway."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """clock: Unix time in seconds."""
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._num_chars = 0

    def keep(self, audio_id: str, owner: str, text: str, expires_at: float) -> None:
        """For its owner alone, until then, or until there is too much."""
        self._kept[audio_id] = _Kept(owner, text, expires_at)
        self._num_chars += len(text)
        while len(self._kept) > MOST_KEPT or self._num_chars > MOST_KEPT_CHARS:
            _, oldest = self._kept.popitem(last=False)
            self._num_chars -= len(oldest.text)

    def find(self, audio_id: str, owner: str) -> str | None:
        kept = self._kept.get(audio_id)
        if kept is None or kept.owner != owner or kept.expires_at < self._clock():
            return None
        return kept.text

    def resolved(self, messages: Sequence[Message], owner: str) -> list[Message]:
        """The same, with a text in place of each id that stands for one: the kept one, else the transcript that the
        client sent with it. Raises ApiError 400 where there is neither, or where short ids stand for too much text."""
        resolved, num_chars = [], 0
        for number, message in enumerate(messages):
            turn = self._resolve(number, message, owner)
            num_chars += 0 if turn is message else len(turn.content)
            if num_chars > MOST_KEPT_CHARS:
                reason = f"spoken answers come to more than {MOST_KEPT_CHARS} characters"
                raise ApiError(400, f"messages: {reason}.", param="messages", code="context_length_exceeded")
            resolved.append(turn)
        return resolved

    def _resolve(self, number: int, message: Message, owner: str) -> Message:
        if message.audio is None or message.content:
            return message
        text = self.find(message.audio.id, owner)
        text = message.audio.transcript if text is None else text
        if text is None:
            reason = "names no answer that was spoken lately; send its transcript as content"
            param = f"messages.{number}.audio.id"
            raise ApiError(400, f"{param} {reason}.", param=param, code="audio_not_found")
        return message.model_copy(update={"content": text, "audio": None})
