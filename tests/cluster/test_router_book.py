"""What the supervisor knows of its routers, and for how long."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from cluster.capacity import Load
from cluster.router_book import FORGET_AFTER_S, RouterBook, RouterLoad
from extraction.manifest import ExpertKey


def test_roster_is_followed_when_every_router_has_carried_it_out() -> None:
    book = RouterBook()
    assert book.all_follow(5, 0.0) is None
    book.follows("a", 5, None, 0.0)
    book.follows("b", 4, None, 0.0)
    assert book.all_follow(5, 0.0) is False
    book.follows("b", 6, None, 1.0)
    assert book.all_follow(5, 1.0) is True
    assert book.highest_version() == 6


def test_router_that_is_silent_is_forgotten_with_its_load_and_its_wish() -> None:
    book = RouterBook()
    book.follows("gone", 1, Fraction(1), 0.0)
    book.report("gone", RouterLoad(Load(3, 1, 8)), 0.0)
    book.follows("here", 2, Fraction(1, 4), FORGET_AFTER_S)
    assert book.all_follow(2, FORGET_AFTER_S) is True
    assert book.load(FORGET_AFTER_S) is None
    assert book.share() == Fraction(1, 4)


def test_actors_keep_what_any_router_wishes_and_all_where_none_has_a_wish() -> None:
    book = RouterBook()
    book.follows("a", 1, None, 0.0)
    assert book.share() == 1
    book.follows("b", 1, Fraction(1, 8), 0.0)
    book.follows("c", 1, Fraction(1, 2), 0.0)
    assert book.share() == Fraction(1, 2)


def test_loads_and_rows_of_all_routers_are_added_up_and_rows_are_taken_once() -> None:
    book = RouterBook()
    book.report("a", RouterLoad(Load(1, 2, 8), {("model", 0): np.array([1, 2, 0])}), 0.0)
    book.report("b", RouterLoad(Load(3, 0, 8), {("model", 0): np.array([0, 5, 7])}), 0.0)
    assert book.load(0.0) == Load(4, 2, 16)
    groups = {
        "first": (ExpertKey("model", 0, 0), ExpertKey("model", 0, 1)),
        "second": (ExpertKey("model", 0, 2), ExpertKey("model", 1, 2)),
    }
    assert book.take_rows(groups) == {"first": 8, "second": 7}
    assert book.take_rows(groups) == {"first": 0, "second": 0}
