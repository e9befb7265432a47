"""What the supervisor tells actors that run: each once, whoever started it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import actor_notices
from cluster.actor_notices import ActorNotices, Limits
from cluster.members import Member

MEMBER = Member("experts-0", "ready", 0.0, 0.0, "experts-0", incarnation=7, budget_bytes=100)


@dataclass
class _Actor:
    told: list[Limits] = field(default_factory=list)

    @property
    def set_limits(self) -> Any:
        return SimpleNamespace(remote=lambda *limits: self.told.append(limits) or "answer")


@pytest.fixture(autouse=True)
def answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(answers: Sequence[Any], timeout: float) -> tuple[Sequence[Any], Sequence[Any]]:
        return answers, ()

    monkeypatch.setattr(actor_notices, "ray", SimpleNamespace(wait=wait, get=lambda answer: None))


def test_actor_is_told_its_limits_once_and_again_where_they_change() -> None:
    actor, notices = _Actor(), ActorNotices()
    whole, quarter = (100, Fraction(1)), (100, Fraction(1, 4))
    for limits in (whole, whole, quarter, quarter, whole, whole):
        notices.tell({"experts-0": (MEMBER, actor)}, {"experts-0": limits}, None, 0.0)
    assert actor.told == [whole, quarter, whole]


def test_actor_that_an_earlier_supervisor_has_told_less_gets_all_of_its_budget_back() -> None:
    """Nobody knows what it was told: its budget says only what it was started with."""
    actor = _Actor()
    ActorNotices().tell({"experts-0": (MEMBER, actor)}, {"experts-0": (100, Fraction(1, 64))}, None, 0.0)
    ActorNotices().tell({"experts-0": (MEMBER, actor)}, {"experts-0": (100, Fraction(1))}, None, 0.0)
    assert actor.told[-1] == (100, Fraction(1))
