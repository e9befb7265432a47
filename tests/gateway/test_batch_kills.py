"""A batch that is killed at any moment and started again has the bytes of one that was not. No Ray here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KILLS = 6


def kill_often(store: Path, work: Path, num_rows: int, num_kills: int, engine: str) -> dict[str, int]:
    """Runs the harness in a process of its own, since it forks."""
    arguments = [str(store), str(work), str(num_rows), str(num_kills), "7", engine]
    command = [sys.executable, "-m", "tests.gateway.batch_kills", *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert outcome.returncode == 0, outcome.stderr
    found: dict[str, int] = json.loads(outcome.stdout.splitlines()[-1])
    return found


def test_batch_killed_at_any_moment_ends_with_the_same_bytes(tiny_store: Path, tmp_path: Path) -> None:
    found = kill_often(tiny_store, tmp_path, 40, KILLS, "fake")
    assert found["killed"] >= KILLS
    assert found["equal"] == found["outputs"]
    assert found["files"] == 40 // 8 + 2  # parts, job and manifest; no temporary file
