"""What a router tells a supervisor that is being restarted, and asks it."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster import ray_directory
from cluster.ray_directory import RayDirectory
from experts.roster import Roster

BAD = [("experts-0", 1, "NaN"), ("experts-1", 2, "NaN")]


def _directory(
    monkeypatch: pytest.MonkeyPatch, *answers: Any
) -> tuple[RayDirectory, list[tuple[str, int, str]]]:
    """One that has something to report, and what its supervisor is told."""
    told: list[tuple[str, int, str]] = []
    given = iter(answers)

    def get(answer: Any, timeout: float) -> Any:
        taken = next(given)
        if isinstance(taken, Exception):
            raise taken
        return taken

    monkeypatch.setattr(ray_directory, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    directory = RayDirectory.__new__(RayDirectory)
    directory._bad = deque(BAD)
    directory._supervisor = SimpleNamespace(
        report_bad=SimpleNamespace(remote=lambda *report: told.append(report))
    )
    return directory, told


def test_wrong_rows_are_reported_once_where_the_supervisor_takes_it_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory, told = _directory(monkeypatch, True, True)
    directory._report_all_bad()
    assert told == BAD and not directory._bad


@pytest.mark.parametrize("answer", [False, TimeoutError("it is being restarted")])
def test_wrong_rows_are_reported_again_where_the_supervisor_did_not_take_it_in(
    monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    directory, told = _directory(monkeypatch, answer, True, True)
    with suppress(TimeoutError):  # whoever calls it tries again a second later
        directory._report_all_bad()
    assert list(directory._bad) == BAD
    directory._report_all_bad()
    assert told == [BAD[0], *BAD] and not directory._bad


def test_a_supervisor_that_dies_while_a_router_begins_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = Roster(2, {}, {})
    died = ray.exceptions.ActorDiedError()
    directory, _ = _directory(monkeypatch, died, False, True, died, newer, died, newer)
    monkeypatch.setattr(ray_directory, "BEGIN_INTERVAL_S", 0.0)
    carried_out: list[Roster] = []
    started = Event()
    directory._name, directory._share, directory._roster, directory._closing = (
        "",
        None,
        Roster(1, {}, {}),
        Event(),
    )
    directory.remote = SimpleNamespace(update=carried_out.append)  # type: ignore[assignment]
    directory._follower = SimpleNamespace(start=started.set)  # type: ignore[assignment]
    question = SimpleNamespace(remote=lambda *_: None)
    directory._supervisor = SimpleNamespace(is_begun=question, roster=question)
    directory.begin()
    assert carried_out == [newer, newer] and started.is_set()
