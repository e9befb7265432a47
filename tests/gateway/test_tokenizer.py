"""Text and tokens, with the bundled tokenizer and small ones of other kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from gateway.errors import ModelFileInvalid
from gateway.text.tokenizer import SPLIT_MARK, TextTokenizer
from tests.gateway.fake_router import STORIES, VOCAB_SIZE, stories_tokenizer

TOKENIZER = stories_tokenizer()
LIBRARY = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60)


def _byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of Llama 2's kind: pieces with a space mark, and a token for every byte."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁", "é", "▁日本"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@given(IDS)
def test_pushed_pieces_equal_the_library_s_decoding(ids: list[int]) -> None:
    detokenizer = TOKENIZER.detokenizer()
    streamed = "".join([*map(detokenizer.push, ids), detokenizer.flush()])
    assert streamed == LIBRARY.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_encoding(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == LIBRARY.decode(LIBRARY.encode(text).ids)


@given(st.text("ab é日本", max_size=20))
def test_byte_fallback_pieces_equal_the_library_s_decoding(text: str) -> None:
    library = _byte_fallback_tokenizer()
    ids = library.encode(text.replace(" ", "▁")).ids
    detokenizer = TextTokenizer(library).detokenizer()
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == library.decode(ids)


def test_character_split_over_tokens_is_held_back() -> None:
    ids = TOKENIZER.encode("😀")
    detokenizer = TOKENIZER.detokenizer()
    assert len(ids) > 1
    assert [detokenizer.push(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["😀"]


def test_unfinished_character_is_replaced_at_the_end() -> None:
    detokenizer = TOKENIZER.detokenizer()
    assert detokenizer.push(TOKENIZER.encode("😀")[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_unknown_id_has_no_text() -> None:
    assert TOKENIZER.decode([10**9]) == ""


def test_control_tokens_spelled_in_a_message_become_plain_text() -> None:
    special = set(TOKENIZER.special_tokens)
    assert special
    text = "".join(TOKENIZER.special_tokens.values()) + "hello"
    assert special & set(TOKENIZER.encode(text))
    ids = TOKENIZER.encode_rendered(TOKENIZER.defuse(text))
    assert not special & set(ids)
    assert TOKENIZER.decode(ids) == text


def test_split_mark_of_a_user_arms_nothing() -> None:
    token = next(iter(TOKENIZER.special_tokens.values()))
    for at in range(len(token) + 1):
        typed = token[:at] + SPLIT_MARK + token[at:] + token
        ids = TOKENIZER.encode_rendered(TOKENIZER.defuse(typed))
        assert not set(TOKENIZER.special_tokens) & set(ids)


def test_rendered_control_tokens_stay_tokens() -> None:
    token_id, token = next(iter(TOKENIZER.special_tokens.items()))
    assert TOKENIZER.encode_rendered(f"{TOKENIZER.defuse(token)}{token}")[-1] == token_id


@given(st.text("a <|im_start|>\n😀", max_size=200), st.integers(0, 50))
def test_certainly_longer_is_never_wrong(text: str, num_tokens: int) -> None:
    if TOKENIZER.is_certainly_longer(text, num_tokens):
        assert len(TOKENIZER.encode(text)) > num_tokens


def test_absurdly_long_text_is_known_to_be_longer() -> None:
    assert TOKENIZER.is_certainly_longer("x" * 1_000_000, 2048)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_missing_or_damaged_file_is_a_clear_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFileInvalid, match=r"tokenizer\.json"):
        TextTokenizer.from_folder(tmp_path)


def test_truncation_and_padding_of_the_file_are_off() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.enable_truncation(2)
    library.enable_padding(length=8)
    assert TextTokenizer(library).encode("a a a") == [0, 0, 0]
