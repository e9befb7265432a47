"""An answer's text as it grows: tokens in, text out that is certain to stay, cut before a stop string.

What is shown depends on the tokens alone, not on how they are spread over events. Called by `gateway.completions`.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.detokenizer import Detokenizer


class StopScanner:
    """Finds the stop string that ends first (of several that end together, the longest) in text that comes in
    pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.is_found = False

    def push(self, text: str) -> str:
        """The text that can be shown now. After a stop string was found there is none."""
        if self.is_found:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)[1]]
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class AnswerText:
    """The text of one answer."""

    def __init__(self, detokenizer: Detokenizer, eos_token_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer, self._eos_token_ids = detokenizer, frozenset(eos_token_ids)
        self._scanner = StopScanner(stops)
        self.num_tokens = 0
        """Tokens that were used: all up to the one that completed a stop string."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the answer; further tokens are not used."""
        return self._scanner.is_found

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain. Tokens that end an answer have no text."""
        pieces = []
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            if token_id not in self._eos_token_ids:
                pieces.append(self._scanner.push(self._detokenizer.push(token_id)))
        return "".join(pieces)

    def flush(self) -> str:
        """The rest of the text, once the last token was pushed. May complete a stop string."""
        if self.is_stopped:
            return ""
        return self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()
