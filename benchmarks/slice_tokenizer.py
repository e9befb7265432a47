"""A small valid tokenizer for generated checkpoints: id b is byte b, the rest are names, the last ends a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


def write_byte_tokenizer(path: Path, vocab_size: int, control: Mapping[int, str] | None = None) -> None:
    """Needs at least 257 ids. Text becomes one id a byte; every other id decodes to a name of its own.

    control: names of some ids above 255, which are then control tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    end = vocab_size - 1
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    names = {end: END_OF_TEXT, **(control or {})}
    vocab |= {names.get(number, f"<unused{number}>"): number for number in range(256, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names.values()])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
