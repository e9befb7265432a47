"""An answer's text as it grows: tokens in, text out that is certain to stay, cut before a stop string.

What is shown depends on the tokens alone, not on how they are spread over events. Called by `gateway.http.completions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.text.detokenizer import Detokenizer


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
        num_held = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class AnswerText:
    """The text of one answer, and where in it each token begins."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        silent_ids: Iterable[int],
        stops: Sequence[str],
        *,
        min_tokens: int = 0,
    ) -> None:
        """silent_ids: tokens without text, such as those that end an answer. min_tokens: stop strings are looked
        for in the text after that many tokens."""
        self._detokenizer, self._silent_ids = detokenizer, frozenset(silent_ids)
        self._scanner = StopScanner(stops)
        self._min_tokens = min_tokens
        self._num_chars = 0
        """Of all text that became certain, held back or not."""
        self.num_tokens = 0
        """Tokens that were used: all up to the one that completed a stop string."""

    @property
    def num_chars(self) -> int:
        """Of the tokens' text so far, shown or not."""
        return self._num_chars

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the answer; further tokens are not used."""
        return self._scanner.is_found

    def echo(self, prompt_ids: Sequence[int]) -> tuple[str, list[int]]:
        """A prompt's text, with all its tokens, and the offset of each. Before anything else."""
        pieces, offsets = [], []
        for token_id in prompt_ids:
            offsets.append(self._num_chars)
            pieces.append(self._decode(token_id))
        return "".join(pieces), offsets

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain."""
        return self.take(token_ids)[0]

    def take(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """Text that became certain, and for each token that was used the offset of its first character. Tokens
        that share a character have the same."""
        pieces, offsets = [], []
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            offsets.append(self._num_chars)
            if token_id not in self._silent_ids:
                text = self._decode(token_id)
                pieces.append(text if self.num_tokens <= self._min_tokens else self._scanner.push(text))
        return "".join(pieces), offsets

    def flush(self) -> str:
        """The rest of the text, once the last token was pushed. May complete a stop string."""
        if self.is_stopped:
            return ""
        return self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()

    def _decode(self, token_id: int) -> str:
        text = self._detokenizer.push(token_id)
        self._num_chars += len(text)
        return text
