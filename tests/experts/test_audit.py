"""Audits: which answers, who agrees with whom, who is wrong, and how soon a liar is found."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.audit import ROWS_OF_EXPERT, Auditor, Opinion, agree, find_wrong, is_due
from experts.call import ExpertCall
from experts.shares import Place
from tests.experts.fleet import call_of
from tests.experts.wire_peers import eventually, rows_of

pytestmark = pytest.mark.usefixtures("nothing_stays")


def _opinion(place: Place, rows_RD: torch.Tensor, numerics_class: str = "own") -> Opinion:
    return Opinion(place, 1, numerics_class, rows_RD)


RIGHT = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
WRONG = RIGHT + 1.0
ALSO_WRONG = RIGHT - 1.0


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3])
def test_share_of_answers_is_audited(share: float) -> None:
    num = 40_000
    due = sum(is_due(7, number, share) for number in range(num))
    spread = (num * share * (1 - share)) ** 0.5
    assert abs(due - num * share) < 4 * spread


def test_which_answers_are_audited_depends_on_the_seed_alone() -> None:
    def chosen(seed: int) -> list[int]:
        return [number for number in range(2000) if is_due(seed, number, 0.05)]

    assert chosen(1) == chosen(1) != chosen(2)
    assert all(is_due(1, number, 1.0) and not is_due(1, number, 0.0) for number in range(100))


def test_larger_share_audits_what_the_smaller_one_did_and_more() -> None:
    few = {number for number in range(5000) if is_due(3, number, 0.01)}
    many = {number for number in range(5000) if is_due(3, number, 0.1)}
    assert few < many


def test_within_a_class_one_bit_is_a_disagreement() -> None:
    other = RIGHT.clone()
    other[2, 3] = torch.nextafter(other[2, 3], torch.tensor(torch.inf))
    assert agree(_opinion("a", RIGHT), _opinion("b", RIGHT.clone()))
    assert not agree(_opinion("a", RIGHT), _opinion("b", other))
    assert agree(_opinion("a", RIGHT), _opinion("b", other, "gpu"))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_between_classes_more_than_rounding_is_a_disagreement(dtype: torch.dtype, factor: float) -> None:
    right = RIGHT.to(dtype)
    rounded = (RIGHT * (1 + factor / 100)).to(dtype)
    wrong = (RIGHT * (1 + factor)).to(dtype)
    assert agree(_opinion("a", rounded), _opinion("b", right, "gpu"))
    assert not agree(_opinion("a", wrong), _opinion("b", right, "gpu"))


def test_negative_zero_is_another_bit() -> None:
    zeros = torch.zeros(1, 8)
    assert not agree(_opinion("a", zeros), _opinion("b", -zeros))


def test_two_who_agree_outvote_the_third() -> None:
    first, second = _opinion("a", WRONG), _opinion("b", RIGHT)
    assert find_wrong([first, second]) is None
    assert find_wrong([first, second, _opinion(None, RIGHT)]) == {"a"}
    assert find_wrong([first, second, _opinion("c", WRONG)]) == {"b"}
    assert find_wrong([second, _opinion("c", RIGHT)]) == frozenset()


def test_this_process_is_believed_where_nobody_agrees() -> None:
    opinions = [_opinion("a", WRONG), _opinion(None, RIGHT), _opinion("b", ALSO_WRONG)]
    assert find_wrong(opinions) is None
    assert find_wrong(opinions, is_last=True) == {"a", "b"}


def test_two_actors_that_differ_without_a_third_cannot_be_told_apart() -> None:
    assert find_wrong([_opinion("a", WRONG), _opinion("b", RIGHT)], is_last=True) is None


@given(st.permutations(["a", "b", None]), st.sampled_from(["a", "b"]))
def test_minority_is_found_in_whatever_order_opinions_come(order: list[Place], liar: str) -> None:
    opinions = [_opinion(place, WRONG if place == liar else RIGHT) for place in order]
    assert find_wrong(opinions) == {liar}


# The auditor


class Others:
    """Answers for everybody else, and notes what it was asked."""

    def __init__(self, *places: Place) -> None:
        self.places = places
        self.calls: list[ExpertCall] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def ask(self, call: ExpertCall, place: Place) -> Iterator[Opinion]:
        self.may_go_on.wait(20.0)
        self.calls.append(call)
        for other in self.places:
            if other != place:
                yield _opinion(other, rows_of(call))


def _offer(auditor: Auditor, call: ExpertCall, place: str, *, is_wrong: bool = False) -> None:
    auditor.offer(call, _opinion(place, rows_of(call) + is_wrong))


def test_liar_is_found_by_a_majority_and_an_honest_actor_is_not() -> None:
    wrong: list[Opinion] = []
    auditor = Auditor(1.0, 0, Others("b", None).ask, wrong.append)
    _offer(auditor, call_of(0), "honest")
    auditor.drain()
    assert (auditor.done, auditor.disagreed, wrong) == (1, 0, [])
    _offer(auditor, call_of(1), "liar", is_wrong=True)
    auditor.drain()
    assert (auditor.done, auditor.disagreed) == (2, 1)
    assert [opinion.place for opinion in wrong] == ["liar"]
    auditor.close()


def test_all_experts_of_an_answer_are_computed_again_but_few_rows() -> None:
    others = Others(None)
    auditor = Auditor(1.0, 0, others.ask, lambda opinion: None)
    call = call_of(3)
    _offer(auditor, call, "a")
    auditor.drain()
    auditor.close()
    assert others.calls[0].experts == call.experts
    assert max(others.calls[0].counts) <= ROWS_OF_EXPERT < max(call.counts)
    assert auditor.disagreed == 0


def test_answers_that_are_due_while_it_is_busy_are_made_up_for() -> None:
    others = Others(None)
    others.may_go_on.clear()
    auditor = Auditor(1.0, 0, others.ask, lambda opinion: None)
    for _ in range(20):
        _offer(auditor, call_of(), "a")
    owed = auditor.owed
    assert owed >= 15, "one is being audited, four wait"
    others.may_go_on.set()
    auditor.drain()
    auditor._share = 0.0001  # from now on none is due, only owed
    for _ in range(owed):
        _offer(auditor, call_of(), "a")
        auditor.drain()
    assert auditor.owed == 0 and auditor.done == 20
    auditor.close()


def test_audit_that_fails_does_not_end_the_auditor() -> None:
    def fail(call: ExpertCall, place: Place) -> Iterator[Opinion]:
        if call.request_id == "request-1":
            raise RuntimeError("a bug")
        yield _opinion(None, rows_of(call))

    auditor = Auditor(1.0, 0, fail, lambda opinion: None)
    _offer(auditor, call_of(1), "a")
    _offer(auditor, call_of(2), "a")
    auditor.drain()
    assert auditor.done == 1
    auditor.close()


def test_closing_drops_what_waits() -> None:
    others = Others(None)
    others.may_go_on.clear()
    auditor = Auditor(1.0, 0, others.ask, lambda opinion: None)
    for _ in range(5):
        _offer(auditor, call_of(), "a")
    closing = threading.Thread(target=auditor.close, daemon=True)
    closing.start()
    assert eventually(lambda: not auditor._share)
    others.may_go_on.set()
    closing.join(20.0)
    assert not closing.is_alive() and auditor.done <= 1
