"""Trust handed down: an actor's scores are those of the owner's table, and it is told when it should be."""

from __future__ import annotations

import numpy as np
import pytest

from experts.errors import TrustMismatch
from experts.group_trust import GroupTrust, HandDown, group_scores
from experts.trust import CONVERGENCE, UNSEEN, TrustSettings, empty_table, observe
from experts.trust_book import TrustBook
from extraction.manifest import ExpertKey

SETTINGS = TrustSettings()
GROUP = tuple(ExpertKey("model", layer, expert) for layer in (4, 1) for expert in (3, 0, 2))


def test_a_group_is_told_what_the_owner_s_book_says() -> None:
    table = empty_table("model", (1, 4), 5)
    experts_N = np.arange(10)
    observe(table, CONVERGENCE, experts_N, experts_N / 10.0, np.full(10, 30.0), 7.0, SETTINGS)
    book = TrustBook(table, SETTINGS)
    trust = GroupTrust(GROUP)
    trust.tell(group_scores(table, SETTINGS, GROUP))
    scores = [trust.score(key) for key in GROUP]
    assert scores == pytest.approx([book.score(key) for key in GROUP])
    assert len(set(scores)) == len(GROUP)


def test_experts_that_nobody_told_of_are_unseen() -> None:
    table = empty_table("model", (1,), 2)
    others = (ExpertKey("talker", 1, 0), ExpertKey("model", 2, 0), ExpertKey("model", 1, 2))
    assert group_scores(table, SETTINGS, others).tolist() == [UNSEEN] * 3
    assert GroupTrust(GROUP).score(GROUP[0]) == UNSEEN
    assert GroupTrust(GROUP).score(others[0]) == UNSEEN


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([0.5] * 5, r"shape \(5,\)"),
        ([0.5] * 5 + [1.5], "out of range"),
        ([0.5] * 5 + [float("nan")], "out of range"),
    ],
)
def test_scores_that_cannot_be_the_group_s_are_refused_and_change_nothing(
    scores: list[float], reason: str
) -> None:
    trust = GroupTrust(GROUP)
    trust.tell(np.full(6, 0.25, np.float32))
    with pytest.raises(TrustMismatch, match=reason):
        trust.tell(np.array(scores, np.float32))
    assert trust.score(GROUP[0]) == 0.25


def test_an_actor_is_told_when_something_new_is_known_and_not_too_often() -> None:
    hand_down = HandDown(5.0)
    assert hand_down.is_due("experts-0", 1, 0, 100.0)
    hand_down.note("experts-0", 1, 0, 100.0)
    assert not hand_down.is_due("experts-0", 1, 0, 200.0), "nothing new"
    assert not hand_down.is_due("experts-0", 1, 9, 104.9), "too soon"
    assert hand_down.is_due("experts-0", 1, 9, 105.0)
    assert hand_down.is_due("experts-0", 2, 0, 100.1), "a new process knows nothing"
    assert hand_down.is_due("experts-1", 1, 0, 100.1)
