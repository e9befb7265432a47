"""Text to token ids and back, from a checkpoint's `tokenizer.json`.

Owns the reading of that file and the guard against control tokens in text. Does not promise ids below the model's
vocabulary (the file may disagree with the model; requests are checked against the model). Safe to use from
several threads. Called by `gateway.http.app` and the commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from gateway.errors import ModelFileInvalid
from gateway.stores.model_files import read_small_file
from gateway.text.detokenizer import Detokenizer, read_token_bytes

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
SPLIT_MARK = "\ufdd0"
"""A Unicode noncharacter: text around it is encoded in separate pieces, and it leaves no token itself."""
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
WORD_START = "\u2581"
"""SentencePiece's stand-in for a space."""
NORMALISED_SHRINKAGE = 4
"""Most characters that a Unicode normalisation composes into one."""


class TextTokenizer:
    """One checkpoint's tokenizer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {id_: token.content for id_, token in added.items() if token.special}
        """Control tokens by id. Decoding leaves them out."""
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        self._is_byte_level = decoder.get("type") == "ByteLevel"
        self._token_bytes = read_token_bytes(tokenizer) if self._is_byte_level else None
        self._longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        longer = sorted({t for t in self.special_tokens.values() if len(t) > 1}, key=len, reverse=True)
        self._special_start = (
            re.compile(f"(?=(?:{'|'.join(map(re.escape, longer))})).", re.S) if longer else None
        )
        self._special_beginnings = frozenset(t[:end] for t in longer for end in range(1, len(t)))
        self._longest_beginning = max(map(len, self._special_beginnings), default=0)

    @classmethod
    def from_folder(cls, path: Path) -> TextTokenizer:
        """Reads `tokenizer.json`. Raises ModelFileInvalid when it is missing, oversized or damaged."""
        content = read_small_file(path / TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
        if content is None:
            raise ModelFileInvalid(TOKENIZER_FILE, f"not found in {path}")
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception for everything
            raise ModelFileInvalid(TOKENIZER_FILE, f"not a tokenizer: {error}") from error
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text. Special tokens are added only where the file's post-processor says so, and
        those that the text spells out are recognised: a completion prompt may hold a template of its own."""
        return self._tokenizer.encode(text).ids

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template, which brings its own special tokens; see `defuse`."""
        if SPLIT_MARK not in text:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        encoded = self._tokenizer.encode_batch(text.split(SPLIT_MARK), add_special_tokens=False)
        return [token_id for piece in encoded for token_id in piece.ids]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a special token."""
        return self.encode_rendered(self.defuse(text))

    def defuse(self, text: str) -> str:
        """Mark every special token that a text spells out, so that `encode_rendered` reads it as plain text.

        Tokens that are not flagged special (such as `<think>`) stay as they are: templates look for them.
        """
        if self._special_start is None:
            return text
        return self._special_start.sub(lambda match: match[0] + SPLIT_MARK, text)

    def defuse_part(self, text: str) -> str:
        """The same for a text that another may follow at once, which could go on with a token that this one begins."""
        endings = (text[-length:] for length in range(1, self._longest_beginning + 1))
        is_beginning = any(ending in self._special_beginnings for ending in endings)
        return self.defuse(text) + (SPLIT_MARK if is_beginning else "")

    def is_certainly_longer(self, text: str, num_tokens: int) -> bool:
        """Whether a text has more tokens than that, told from its length alone. False means unknown."""
        return self._is_byte_level and len(text) > num_tokens * self._longest_token * NORMALISED_SHRINKAGE

    def detokenizer(self, *, has_special: bool = False) -> Detokenizer:
        """A fresh incremental decoder. has_special: control tokens have their text, too."""
        hidden = frozenset() if has_special else frozenset(self.special_tokens)
        return Detokenizer(self._tokenizer, self._token_bytes, hidden)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; nothing for an id without a token. Several may share a character."""
        if self._token_bytes is not None:
            return self._token_bytes.get(token_id, b"")
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(WORD_START, " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a whole sequence; the same as pushing the ids one by one. Ids without a token give nothing."""
        detokenizer = self.detokenizer()
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()])
