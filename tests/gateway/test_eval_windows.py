"""Every token of a text is scored once, with the context that the stride promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import OptionInvalid
from gateway.evaluation.windows import Sliding, Window, cut_windows


@st.composite
def _slidings(draw: st.DrawFn) -> Sliding:
    context = draw(st.integers(2, 40))
    return Sliding(context, draw(st.integers(1, context - 1)))


@given(st.integers(0, 300), _slidings())
def test_every_token_but_the_first_is_scored_once_with_enough_before_it(
    num_tokens: int, sliding: Sliding
) -> None:
    windows = cut_windows(num_tokens, sliding)
    scored = [token for window in windows for token in range(window.scored_first, window.end)]
    assert scored == list(range(1, num_tokens))
    for window in windows:
        assert 2 <= window.end - window.first <= sliding.context
        assert window.num_context >= min(window.scored_first, sliding.context - sliding.stride)
        assert window.num_scored <= (
            sliding.stride if window.first or window.scored_first > 1 else sliding.context
        )


def test_last_window_reaches_back_over_a_whole_context() -> None:
    assert cut_windows(11, Sliding(6, 3)) == [Window(0, 1, 6), Window(3, 6, 9), Window(5, 9, 11)]


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (8, 8), (8, 0), (8, 9)])
def test_stride_that_leaves_a_token_without_context_is_refused(context: int, stride: int) -> None:
    with pytest.raises(OptionInvalid, match="must be"):
        Sliding(context, stride)
