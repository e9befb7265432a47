"""How a long text is cut into windows that fit a context, so that every token is scored once. Pure.

Windows slide by a stride: each scores the tokens after those of the window before, with as much of the text before
them as fits. Called by `gateway.evaluation.run`.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.errors import OptionInvalid


@dataclass(frozen=True)
class Window:
    """Tokens first .. end - 1 of a text, of which those from scored_first on are scored."""

    first: int
    scored_first: int
    end: int

    @property
    def num_scored(self) -> int:
        return self.end - self.scored_first

    @property
    def num_context(self) -> int:
        """Tokens that are computed, but were scored in an earlier window or cannot be."""
        return self.scored_first - self.first


@dataclass(frozen=True)
class Sliding:
    """How windows slide."""

    context: int = 256
    """Tokens in a window."""
    stride: int = 128
    """Tokens scored in a window; the first one scores all of its tokens but the text's first."""

    def __post_init__(self) -> None:
        """Raises OptionInvalid."""
        if self.context < 2:
            raise OptionInvalid("--context", f"must be at least 2 tokens, not {self.context}")
        if not 1 <= self.stride < self.context:
            reason = f"must be from 1 to {self.context - 1}, one less than the context, not {self.stride}"
            raise OptionInvalid("--stride", f"{reason}: a token is scored by those before it")


def cut_windows(num_tokens: int, sliding: Sliding) -> list[Window]:
    """Windows in order. The text's first token has nothing before it and is never scored; every other one is, once,
    with at least `context - stride` tokens before it where the text has them. A text of one token has no window."""
    if num_tokens < 2:
        return []
    windows = [Window(0, 1, min(sliding.context, num_tokens))]
    while windows[-1].end < num_tokens:
        scored_first = windows[-1].end
        end = min(scored_first + sliding.stride, num_tokens)
        windows.append(Window(max(0, end - sliding.context), scored_first, end))
    return windows
