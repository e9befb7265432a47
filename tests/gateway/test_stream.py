"""Stop strings and text that grows by tokens."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.http.stream import AnswerText, StopScanner
from tests.gateway.fake_router import EOS, VOCAB_SIZE, stories_tokenizer

TOKENIZER = stories_tokenizer()
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def _reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the stop string that ends first, of several the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def _scan(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = "".join(map(scanner.push, pieces)) + scanner.flush()
    return shown, scanner.is_found


@given(st.lists(st.text("abc", max_size=5), max_size=10), STOPS)
def test_any_pieces_are_cut_where_the_whole_text_would_be(pieces: list[str], stops: list[str]) -> None:
    assert _scan(pieces, stops) == _reference("".join(pieces), stops)


@given(st.lists(st.text("abc", max_size=5), max_size=10), STOPS)
def test_shown_text_is_never_taken_back(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    final, _ = _reference("".join(pieces), stops)
    shown = ""
    for piece in pieces:
        shown += scanner.push(piece)
        assert final.startswith(shown)


def test_text_without_stop_strings_is_shown_at_once() -> None:
    assert StopScanner(()).push("abc") == "abc"


def test_only_a_possible_beginning_is_held_back() -> None:
    scanner = StopScanner(["</end>"])
    assert [scanner.push("a<"), scanner.push("b</"), scanner.push("en")] == ["a", "<b", ""]
    assert scanner.push("d> tail") == ""
    assert scanner.is_found


@given(st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=40), st.lists(st.integers(0, 40), max_size=5))
def test_text_does_not_depend_on_how_tokens_are_spread(ids: list[int], cuts: list[int]) -> None:
    stop = TOKENIZER.decode(ids[3:6]) or "x"
    whole = AnswerText(TOKENIZER.detokenizer(), (EOS,), (stop,))
    expected = whole.push(ids) + whole.flush()
    spread = AnswerText(TOKENIZER.detokenizer(), (EOS,), (stop,))
    edges = sorted({0, len(ids), *(min(cut, len(ids)) for cut in cuts)})
    pieces = [spread.push(ids[start:end]) for start, end in pairwise(edges)]
    assert "".join(pieces) + spread.flush() == expected == _reference(TOKENIZER.decode(ids), [stop])[0]
    assert (spread.num_tokens, spread.is_stopped) == (whole.num_tokens, whole.is_stopped)


def test_tokens_after_a_stop_string_are_not_used() -> None:
    ids = TOKENIZER.encode("one two three four")
    text = AnswerText(TOKENIZER.detokenizer(), (EOS,), (" two",))
    assert text.push(ids) == "one"
    assert text.is_stopped
    assert TOKENIZER.decode(ids[: text.num_tokens]).endswith(" two")


def test_end_of_text_token_counts_but_has_no_text() -> None:
    ids = TOKENIZER.encode("hello")
    text = AnswerText(TOKENIZER.detokenizer(), (ids[-1],), ())
    assert text.push(ids) + text.flush() == TOKENIZER.decode(ids[:-1])
    assert text.num_tokens == len(ids)
