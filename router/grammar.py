"""Which tokens an answer may go on with, by a grammar, and whether it is complete.

A grammar is text for `llguidance`: plain data that travels with a request. Its state follows from that text and the
answer's tokens alone, so it is rebuilt anywhere by taking them again. Called by `router.engine_thread` beside the
engine's thread, which only takes tokens: what that costs is bounded by `router.grammar_limits`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from router.errors import GrammarFailed
from router.grammar_limits import GRAMMAR_LIMITS

if TYPE_CHECKING:  # imported where the first grammar comes: few services see one
    from llguidance import LLMatcher, LLTokenizer

TOKENIZER_FILE = "tokenizer.json"
LARGE = 1e30
"""Its square is an infinity of float32."""


class GrammarState:
    """Of one answer: the tokens that may come next."""

    def __init__(self, matcher: LLMatcher, end_id: int, vocab_size: int, stop_ids: Sequence[int]) -> None:
        """matcher: its own, before the first token. end_id: the token that stands for the answer's end in masks, and
        for nothing else. stop_ids: may be drawn where the answer may end. Raises GrammarFailed."""
        self._matcher, self._end_id, self._vocab_size = matcher, end_id, vocab_size
        self._stop_ids = list(stop_ids)
        self.is_complete = False
        """Whether nothing can be added."""
        self._barrier_V = torch.zeros(0)
        """0 for tokens that may come next, -inf for others."""
        self._look()

    def take(self, token: int) -> None:
        """Note a token of the answer. Raises GrammarFailed."""
        if token in self._stop_ids and not self._allows_text(token):
            self.is_complete = True
            return
        if not self._matcher.consume_token(token):
            raise GrammarFailed(f"it does not allow token {token}, or grew too complex there")
        self._look()

    def allowed_only(self, logits_V: Tensor) -> Tensor:
        """The logits, float32, of tokens that may come next; those of others are -inf."""
        return logits_V + self._barrier_V

    def _allows_text(self, token: int) -> bool:
        return bool(self._matcher.validate_tokens([token]))

    def _look(self) -> None:
        """Find what may come next."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarFailed(f"it grew too complex: {_first_line(self._matcher.get_error())}")
        allowed = np.unpackbits(packed, bitorder="little")
        can_end = bool(allowed[self._end_id])
        allowed[self._end_id] = 0
        allowed = allowed[: self._vocab_size]
        self.is_complete = can_end and not allowed.any()
        if can_end:
            allowed[self._stop_ids] = 1
        # Sums and products of the whole row: choosing element by element takes six times as long.
        self._barrier_V = torch.from_numpy(allowed).to(torch.float32).sub_(1.0).mul_(LARGE).mul_(LARGE)


class Grammars:
    """Compiles grammars for one model's vocabulary. Safe to use from several threads."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """folder: with the model's `tokenizer.json`, which is read when the first grammar comes."""
        self._path, self._vocab_size = folder / TOKENIZER_FILE, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._end_id = 0

    def begin(self, text: str, stop_ids: Sequence[int], taken: Iterable[int] = ()) -> GrammarState:
        """The state after tokens that the answer has already. Raises GrammarFailed."""
        state = GrammarState(self._compile(text), self._end_id, self._vocab_size, stop_ids)
        for token in taken:
            state.take(token)
        return state

    def _compile(self, text: str) -> LLMatcher:
        """Anew for each answer: copies of a matcher share what they have built of its automaton, and its limits, so
        that whether one answer meets them would depend on others."""
        from llguidance import LLMatcher, LLParserLimits

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
        limits = LLParserLimits(**GRAMMAR_LIMITS)
        matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarFailed(_first_line(matcher.get_error()))
        return matcher

    def _read_vocabulary(self) -> LLTokenizer:
        """Takes a second for 150,000 tokens."""
        from llguidance import LLTokenizer

        try:
            content = self._path.read_text("utf-8")
            added = json.loads(content).get("added_tokens", [])
            # What `llguidance` takes for the end of a text must be no text; which one it is does not matter.
            self._end_id = min(token["id"] for token in added if token["special"])
            size = max(self._vocab_size, 1 + max(token["id"] for token in added))
            return LLTokenizer(content, n_vocab=size, eos_token=self._end_id)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GrammarFailed(f"{TOKENIZER_FILE} cannot be used for grammars: {error}") from error


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:200] if message.strip() else "no reason given"
