"""Twenty kills of a running service on three Ray nodes, in the middle of answers, at points that a seed has chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from cluster.resources import NAMESPACE, SUPERVISOR_NAME
from tests.chaos.service_under_fire import service_under_fire, wait_for
from tests.chaos.trials import Range, Trial, plan_trials

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

SEED = 20
QUICK = {
    ("actor killed", 2): 5,
    ("actor killed in the middle of a frame", 2): 1,
    ("actor killed while it drains", 2): 1,
    ("actor hangs", 2): 1,
    ("connection cut", 2): 3,
    ("supervisor killed", 2): 1,
    ("router killed", 2): 1,
    ("router killed, and the supervisor with it", 2): 1,
    ("actor killed", 1): 2,
    ("actor killed, and its replacement when connected to", 1): 1,
    ("actor killed, and its replacement while loading", 1): 1,
    ("actor killed, and the supervisor that replaces it", 1): 1,
    ("node lost", 1): 1,
}
"""20 kills: four of these are two."""
TRIALS = plan_trials(SEED, QUICK)


@pytest.fixture(scope="module")
def fire(stories_store: Path) -> Iterator[Range]:
    with service_under_fire(stories_store) as service:
        yield Range(service)


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: f"{trial.number}-{trial.kind}-{trial.point}")
def test_reader_does_not_notice(fire: Range, trial: Trial) -> None:
    result = fire.run(trial)
    assert result.is_equal, result.errors
    assert result.is_fired or trial.kind == "actor killed while it drains", result.as_json()


def test_afterwards_what_is_planned_runs_and_nothing_else(fire: Range) -> None:
    """No actor, and no process of one, is left of those that were killed, hung or half made."""
    service = fire.service
    service.settle()
    actors = service.actors()
    planned = {SUPERVISOR_NAME, *(actor["name"] for actor in actors)}
    wait_for(lambda: _names() == planned)
    wait_for(lambda: _processes("ray::ExpertActor") == {actor["pid"] for actor in actors})


def _names() -> set[str]:
    """Of actors in our namespace."""
    return {each["name"] for each in ray.util.list_named_actors(True) if each["namespace"] == NAMESPACE}


def _processes(title: str) -> set[int]:
    """Of that title, below this process."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline())
            if words.startswith(title) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found
