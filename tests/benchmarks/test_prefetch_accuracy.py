"""What is counted of guesses, on a text of two tokens and two layers that can be counted by hand."""

from __future__ import annotations

import pytest

from benchmarks.prefetch_accuracy import Guess, accuracy

GUESSES = [
    Guess(0, None, (0, 1)),
    Guess(1, (0, 1), (1, 2)),  # one right, one wrong
    Guess(0, None, (0, 3)),  # one of them is there
    Guess(1, (1, 2), (1, 2)),  # right, and there already
]


def test_guesses_are_weighed_against_what_a_cache_of_everything_lacks() -> None:
    found = accuracy(GUESSES, num_experts=8, share=1.0)
    assert found["of_uses"] == 3 / 4
    assert found["of_misses"] == 1 / 2
    assert found["useful_reads"] == 1 / 2, "experts that are there are not read"
    assert found["most_hidden"] == pytest.approx(1 / 5)


def test_a_cache_that_keeps_nothing_needs_every_guess() -> None:
    """It holds two experts, one layer's, so that every use is a miss and every guess a read."""
    found = accuracy(GUESSES, num_experts=8, share=0.25)
    assert (found["of_uses"], found["of_misses"], found["useful_reads"]) == (3 / 4, 3 / 4, 3 / 4)
    assert found["most_hidden"] == pytest.approx(3 / 8)
