"""A command in a session of its own, for as long as a test needs it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.processes import end_processes

REPOSITORY = Path(__file__).parent.parent
TIMEOUT_S = 240.0


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], sign: str, log: Path) -> Iterator[Any]:
    """Once it has said its sign; killed with all that it started."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until(lambda: sign in log.read_text(), lambda: process.poll() is None, log)
        yield process
    finally:
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            end_processes(family, 0.0)
        process.wait()


def _wait_until(is_reached: Callable[[], bool], is_alive: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_reached():
        assert is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
