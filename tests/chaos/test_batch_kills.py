"""Fifty kills of a batch with a real engine, and of the command itself with its Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.gateway.batch_kills import write_rows
from tests.gateway.test_batch_kills import kill_often

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

KILLS = 50
COMMAND_KILLS = 2
START_TIMEOUT_S = 120.0


def test_fifty_kills_lose_and_double_no_row(tiny_store: Path, tmp_path: Path) -> None:
    found = kill_often(tiny_store, tmp_path, 60, KILLS, "real")
    assert found["killed"] >= KILLS
    assert found["equal"] == found["outputs"]


@pytest.mark.ray
def test_command_killed_with_its_ray_goes_on_and_has_every_row_once(tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "rows.jsonl", 3000), tmp_path / "output"
    command = [sys.executable, "-m", "gateway.cli", "batch", "stories", str(source), str(output)]
    for number in range(COMMAND_KILLS):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait_for_parts(run, output, number + 1)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((output / "_manifest.json").read_bytes())["rows"] == 3000
    table = pq.read_table(output)
    assert table.column("index").to_pylist() == list(range(3000))
    assert table.column("id").to_pylist() == [f"r{index}" for index in range(3000)]


def _wait_for_parts(run: subprocess.Popen[bytes], output: Path, count: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(list(output.glob("part-*.parquet"))) < count:
        assert run.poll() is None and time.monotonic() < deadline, "no new part in time"
        time.sleep(0.02)
