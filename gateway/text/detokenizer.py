"""Token ids to text, one token at a time, as they are generated.

Text is handed out as soon as no later token can change it. For byte-level tokenizers (GPT-2, Qwen, Llama 3 and
their kin) the pieces joined equal the library's decoding of the whole sequence, for any sequence. For others this
holds for every sequence that is valid UTF-8; invalid bytes come out as replacement characters either way, possibly
another number of them. Called by `gateway.text.tokenizer` (plain decoding, too, so that streamed and unstreamed answers
agree) and `gateway.http.stream`.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping

import tokenizers

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8
"""Tokens held back for one unfinished character; four bytes make any character, so more are invalid."""


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, which byte-level vocabularies are written in."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    stand_ins = [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]
    return dict(zip(stand_ins, [*printable, *others], strict=True))


def read_token_bytes(tokenizer: tokenizers.Tokenizer) -> dict[int, bytes]:
    """For a byte-level tokenizer: what each id decodes to. A token with a character that stands for no byte
    (an added token) is its own text, as in the library."""
    byte_of = byte_of_character()
    table = {}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        try:
            table[token_id] = bytes([byte_of[character] for character in token])
        except KeyError:
            table[token_id] = token.encode()
    return table


class Detokenizer:
    """The state of one sequence. `push` every token once, then `flush` once."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        token_bytes: Mapping[int, bytes] | None,
        hidden_ids: frozenset[int],
    ) -> None:
        """token_bytes: the table of a byte-level tokenizer, None for another. hidden_ids: left out of text."""
        self._tokenizer, self._token_bytes, self._hidden_ids = tokenizer, token_bytes, hidden_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []
        self._num_shown = 0
        """The window's first tokens whose text was handed out; the rest is held back."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often one token's, sometimes none."""
        if token_id in self._hidden_ids:
            return ""
        if self._token_bytes is not None:
            return self._utf8.decode(self._token_bytes.get(token_id, b""))
        self._window.append(token_id)
        num_held = len(self._window) - self._num_shown
        return self._advance(is_forced=num_held > MAX_HELD_TOKENS)

    def flush(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        if self._token_bytes is not None:
            return self._utf8.decode(b"", final=True)
        return self._advance(is_forced=True)

    def _advance(self, *, is_forced: bool) -> str:
        """Decode the window with and without its new tokens: a token's text may depend on the one before it
        (a leading space), but not on those before that."""
        before = self._tokenizer.decode(self._window[: self._num_shown], skip_special_tokens=False)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        if not is_forced and (len(text) <= len(before) or text.endswith(REPLACEMENT)):
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text[len(before) :]
