"""Tokens beside text: offsets, bytes and names, for any sequence of tokens, however it is spread and cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.http.logprobs import LoggedToken, chat_logprobs, completion_logprobs, logged
from gateway.http.stream import AnswerText
from router.request import TokenLogprob
from tests.gateway.fake_router import EOS, VOCAB_SIZE, stories_tokenizer

TOKENIZER = stories_tokenizer()
PARTS = TOKENIZER.encode("日本 😀é")
"""Most of these are parts of characters."""
IDS = st.lists(st.one_of(st.sampled_from(PARTS), st.integers(0, VOCAB_SIZE - 1)), max_size=30)


def _log(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -1.0 - token_id, ((token_id, -1.0 - token_id),))


@given(IDS, IDS, st.lists(st.integers(0, 30), max_size=5), st.booleans(), st.integers(0, 5))
def test_streamed_pieces_equal_the_whole(
    prompt: list[int], ids: list[int], cuts: list[int], has_stop: bool, min_tokens: int
) -> None:
    """Text, offsets and the tokens' entries, in both shapes."""
    stops = [TOKENIZER.decode(ids[2:4]) or "x"] if has_stop else []

    def run(edges: list[int]) -> tuple[str, list[LoggedToken], int]:
        text = AnswerText(TOKENIZER.detokenizer(has_special=True), {EOS}, stops, min_tokens=min_tokens)
        shown, offsets = text.echo(prompt)
        tokens = logged(prompt, offsets, [None, *map(_log, prompt[1:])])
        for start, end in pairwise(edges):
            piece, offsets = text.take(ids[start:end])
            shown += piece
            tokens += logged(ids[start:end], offsets, [_log(token_id) for token_id in ids[start:end]])
        return shown + text.flush(), tokens, text.num_tokens

    whole = run([0, len(ids)])
    assert run(sorted({0, len(ids), *(min(cut, len(ids)) for cut in cuts)})) == whole
    text, tokens, num_used = whole
    assert len(tokens) == len(prompt) + num_used
    if not has_stop:
        raw = b"".join(
            TOKENIZER.token_bytes(token.token_id)
            for position, token in enumerate(tokens)
            if position < len(prompt) or token.token_id != EOS
        )
        assert text == raw.decode("utf-8", "replace")
    offsets = [token.offset for token in tokens]
    assert offsets == sorted(offsets) and all(offset <= len(text) or has_stop for offset in offsets)


@given(IDS)
def test_every_token_s_bytes_are_told_in_both_shapes(ids: list[int]) -> None:
    tokens = [LoggedToken(token_id, 0, _log(token_id)) for token_id in ids]
    chat = chat_logprobs(tokens, TOKENIZER.token_bytes)["content"]
    assert [bytes(entry["bytes"]) for entry in chat] == [TOKENIZER.token_bytes(i) for i in ids]
    completion = completion_logprobs(tokens, TOKENIZER.token_bytes)
    for token_id, name, top, entry in zip(
        ids, completion["tokens"], completion["top_logprobs"], chat, strict=True
    ):
        raw = TOKENIZER.token_bytes(token_id)
        told = (
            bytes(int(part, 16) for part in name.removeprefix("bytes:").split("\\x")[1:])
            if name.startswith("bytes:\\x")
            else name.encode()
        )
        assert told == raw
        assert top == {name: -1.0 - token_id}
        assert entry["token"] == name.removeprefix("bytes:")


def test_alternatives_have_the_token_itself_too() -> None:
    token = LoggedToken(500, 3, TokenLogprob(500, -5.0, ((600, -0.5), (700, -1.0))))
    named = completion_logprobs([token, LoggedToken(1, 0, None)], TOKENIZER.token_bytes)
    assert sorted((named["top_logprobs"][0] or {}).values()) == [-5.0, -1.0, -0.5]
    assert (named["token_logprobs"], named["text_offset"]) == ([-5.0, None], [3, 0])
    chat = chat_logprobs([token], TOKENIZER.token_bytes)["content"][0]
    assert [top["logprob"] for top in chat["top_logprobs"]] == [-0.5, -1.0]


def test_stop_string_within_the_minimum_length_does_not_count() -> None:
    ids = TOKENIZER.encode("one two one two")
    first = len(TOKENIZER.encode("one two"))
    text = AnswerText(TOKENIZER.detokenizer(), {EOS}, [" two"], min_tokens=first)
    assert text.push(ids) == "one two one"
    assert text.is_stopped and text.num_tokens == len(ids)
