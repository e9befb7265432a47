"""What compiles grammars of strangers, in `gateway.text.confined_process`: a schema of a few lines may come to more
states than there is memory.

It compiles for a vocabulary of single bytes, whatever the model's is: what cannot be written in bytes cannot be written
in tokens. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

END = 256
MAX_SHOWN_CHARS = 300


class _Bytes:
    """A tokenizer of bytes, as `TokenizerWrapper` asks one."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(END)), b"<|end|>")
    special_token_ids = (END,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def prepare(setup: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """setup: the limits, as `LLParserLimits` knows them."""
    limits, vocabulary = LLParserLimits(**setup["limits"]), LLTokenizer(TokenizerWrapper(_Bytes()))

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        found = check(asked["grammar"], vocabulary, limits)
        if "error" not in found:
            return found
        for name, part in asked["parts"].items():
            of_part = check(part, vocabulary, limits)
            if "error" in of_part:
                return {**of_part, "part": name}
        return found

    return {}, answer


def check(grammar: str, vocabulary: LLTokenizer, limits: LLParserLimits) -> dict[str, Any]:
    """{"error": why it cannot be followed}, or {"warnings": what of it is not enforced}."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        return {"error": _shown(matcher.get_error())}
    warnings = [_shown(warning) for warning in matcher.get_grammar_warnings()]
    allowed = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << END) - 1)
    if not allowed and (not matcher.is_error() or "NoExtension" in matcher.get_error()):
        return {"error": "no text can follow it"}
    if matcher.is_error():
        return {"error": "it is too complex"}
    first = (allowed & -allowed).bit_length() - 1
    if not matcher.consume_token(first):  # some limits show there
        return {"error": "it is too complex"}
    return {"warnings": warnings}


def _shown(message: str) -> str:
    """On one line."""
    return " ".join(message.split())[:MAX_SHOWN_CHARS]
