"""`tokenizer.json` built from a vocabulary and merges, against the tokenizer that `transformers` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from extraction.errors import CheckpointDamaged
from extraction.extract import extract
from extraction.manifest import read_manifest
from extraction.tokenizer_file import built_tokenizer
from gateway.text.tokenizer import TextTokenizer
from tests.checkpoints import write_tiny_qwen3_moe

WORDS = ("Ġthe", "Ġrouter", "expert", "user", "Ġand", "123", "ĠĠĠ", "ĊĊ", "Ã©", "è¯Ń", "'ll", "ING")
ADDED = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<think>": False,
    "</think>": False,
    "<|audio_pad|>": True,
}
TRICKY = [
    "",
    " ",
    "the router and the expert, user's 12345 words; they'll SING",
    "  leading,   many    spaces   \n\n\n  and\r\nlines \t\ttabs",
    "café ＡＢＣ ﬁ Å é Ångström",
    "語言模型 日本語 한국어 ไทย العربية हिन्दी",
    "👩‍👩‍👧‍👦 🇫🇷 \u200b\ufeff\u00a0\u2028 x",
    "<|im_start|>user\nWhat's up?<|im_end|>\n<think>hm</think><|audio_pad|><|audio_pad|>",
    " <|im_end|> <think> <|not_a_token|> <|im_end",
    "I'M WE'RE o'clock'd ''s 1,234.5e-6 x=y_z\\n {\"a\": [1]}",
    "\x00\x01\x7f\x80\xff",
    "aaaa" * 50,
]


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """All bytes, and the merges that make the words out of them."""
    vocabulary = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        left = word[0]
        for character in word[1:]:
            if left + character not in vocabulary:
                merges.append((left, character))
                vocabulary[left + character] = len(vocabulary)
            left += character
    return vocabulary, merges


def _settings(first_id: int, **changes: Any) -> dict[str, Any]:
    added = {
        str(first_id + number): {
            "content": text,
            "special": is_special,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for number, (text, is_special) in enumerate(ADDED.items())
    }
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 4096,
    } | changes


def _files(**changes: Any) -> dict[str, bytes]:
    vocabulary, merges = _vocabulary()
    settings = _settings(len(vocabulary), **changes)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    return {
        "vocab.json": json.dumps(vocabulary).encode(),
        "merges.txt": "\n".join(lines).encode(),
        "tokenizer_config.json": json.dumps({k: v for k, v in settings.items() if v != "absent"}).encode(),
    }


def _published(folder: Path, files: dict[str, bytes]) -> Any:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return AutoTokenizer.from_pretrained(folder)


def _assert_same(built: bytes | None, published: Any) -> None:
    assert built is not None
    ours = Tokenizer.from_str(built.decode())
    for text in TRICKY:
        ids = ours.encode(text).ids
        assert ids == published(text)["input_ids"], repr(text)
        for skip in (True, False):
            expected = published.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected, repr(text)


def test_tokenizer_equals_the_published_one_on_tricky_texts(tmp_path: Path) -> None:
    _assert_same(built_tokenizer(_files(), "qwen3_omni_moe"), _published(tmp_path, _files()))


def test_ids_between_added_tokens_are_kept_free() -> None:
    """The model's embedding has a row for each id; `transformers` would move the token to the next free one."""
    first = len(_vocabulary()[0])
    added = {str(first + 4): {"content": "<|im_end|>", "special": True, "normalized": False}}
    built = built_tokenizer(_files(added_tokens_decoder=added), "qwen3_moe")
    assert built is not None
    assert Tokenizer.from_str(built.decode()).token_to_id("<|im_end|>") == first + 4


def test_older_list_of_added_tokens_is_read(tmp_path: Path) -> None:
    first = len(_vocabulary()[0])
    special = [text for text, is_special in ADDED.items() if is_special]
    files = _files(added_tokens_decoder="absent", additional_special_tokens=special)
    files["added_tokens.json"] = json.dumps({text: first + n for n, text in enumerate(ADDED)}).encode()
    built = built_tokenizer(files, "qwen2_moe")
    assert built is not None
    added = Tokenizer.from_str(built.decode()).get_added_tokens_decoder()
    assert {token.content: token.special for token in added.values()} == ADDED
    _assert_same(built, _published(tmp_path, files))


def test_store_has_a_built_tokenizer_that_serves(tmp_path: Path) -> None:
    checkpoint = write_tiny_qwen3_moe(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    for name, content in _files().items():
        (checkpoint / name).write_bytes(content)
    for index_only in (False, True):
        store = tmp_path / f"store-{index_only}"
        extract(checkpoint, store, index_only=index_only)
        assert "tokenizer.json" in read_manifest(store).files
        tokenizer = TextTokenizer.from_folder(store)
        text = "the router'll say é 語 <think>"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not (checkpoint / "tokenizer.json").exists()


def test_other_tokenizers_are_left_alone() -> None:
    assert built_tokenizer(_files(tokenizer_class="GPT2Tokenizer"), "qwen3_moe") is None
    assert built_tokenizer(_files(tokenizer_class="absent"), "olmoe") is None
    assert built_tokenizer(_files(tokenizer_class="absent"), "qwen3_moe") is not None
    assert built_tokenizer(_files() | {"tokenizer.json": b"{}"}, "qwen3_moe") is None
    assert built_tokenizer({"vocab.json": b"{}"}, "qwen3_moe") is None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("vocab.json", b'{"a": 1}', "not 0, 1, 2"),
        ("vocab.json", b'{"a": "0"}', "not 0, 1, 2"),
        ("vocab.json", b'{"a": 0, "a": 1}', "twice"),
        ("merges.txt", b"\xff", "UTF-8"),
        ("merges.txt", b"#version: 0.2\na b c\n", "line 2"),
        ("merges.txt", b"ab\n", "line 1"),
        ("merges.txt", "a 語\n".encode(), "does not fit"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "no object"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}', "'x'"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"content": 3}}}', "'5'"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"999999999": {"content": "x"}}}', "far behind"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"3": {"content": "zz"}}}', "in use"),
    ],
)
def test_damaged_description_is_refused_by_name(name: str, content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointDamaged, match=reason) as refused:
        built_tokenizer(_files() | {name: content}, "qwen3_moe")
    assert refused.value.file == name
