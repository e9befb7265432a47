"""What chance decides, and what is made of the results, without a service; and failpoints in a process alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.failpoints import POINTS, VARIABLE, Armed, Deed, arm, disarm, fired
from tests.chaos.kill_trials import as_table, num_kills, scaled, summary
from tests.chaos.service_under_fire import IN_PROCESSES, REPOSITORY
from tests.chaos.trials import KINDS, plan_trials

THREE_PASSINGS = """
from experts.listener import welcome
print("begun", flush=True)
for number in range(3):
    try:
        welcome(None, b"", None, b"", 0.0)
    except AttributeError:  # it was called with nobody
        print("passed", flush=True)
"""


def test_two_hundred_kills_meet_every_kind_and_every_point() -> None:
    trials = plan_trials(1, scaled(200))
    assert sum(num_kills(trial.kind) for trial in trials) >= 200
    assert {trial.kind for trial in trials} == KINDS.keys()
    assert {trial.point for trial in trials} == POINTS.keys()
    assert [trial.num_replicas for trial in trials] == sorted((t.num_replicas for t in trials), reverse=True)


def test_seed_decides_all() -> None:
    assert plan_trials(5, scaled(50)) == plan_trials(5, scaled(50))
    assert plan_trials(5, scaled(50)) != plan_trials(6, scaled(50))


def test_summary_counts_what_happened_and_takes_nearest_ranks() -> None:
    trials = [
        {
            "kind": "actor killed",
            "num_replicas": 2,
            "is_fired": number < 20,
            "is_equal": number != 3,
            "num_answers": 1,
            "stall_s": number / 10,
            "usual_gap_s": 0.02,
            "mended_after_s": 4.0 if number == 0 else None,
        }
        for number in range(21)
    ]
    (row,) = summary(trials)
    assert (row["trials"], row["equal"], row["answers"]) == (20, 19, 20)
    assert row["stall_s"] == {"median": 0.9, "p95": 1.8, "max": 1.9}
    assert row["mended_after_s"] == {"median": 4.0, "p95": 4.0, "max": 4.0}
    assert "| actor killed | 2 | 20 | 19 | 900 ms | 1800 ms | 1900 ms | 4.0 s |" in as_table([row])


@pytest.mark.parametrize(
    ("point", "deed", "skip", "num_passed", "code"),
    [
        ("actor is connected to", "kill", 1, 1, -signal.SIGKILL),
        ("actor is connected to", "kill", 3, 3, 0),
        ("actor has a call", "kill", 0, 3, 0),
    ],
)
def test_armed_process_does_the_deed_when_it_passes_the_point(
    tmp_path: Path, point: str, deed: Deed, skip: int, num_passed: int, code: int
) -> None:
    arm(tmp_path, Armed(point, deed, (), skip))
    path = os.pathsep.join([str(IN_PROCESSES), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", THREE_PASSINGS],
        env=os.environ | {VARIABLE: str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["begun", *["passed"] * num_passed], done.stderr
    assert done.returncode == code
    told = fired(tmp_path)
    assert (told is not None) == (code != 0)
    assert told is None or (told["point"], told["deed"]) == (point, deed)
    disarm(tmp_path)
    assert list(tmp_path.iterdir()) == []
