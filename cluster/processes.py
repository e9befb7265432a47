"""Ends what Ray leaves running, and keeps what it says meanwhile from the user: its agents outlive a stopped Ray by
minutes.

Called by whoever starts or leaves a Ray.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable

import psutil


def quietly(stop: Callable[[], None]) -> None:
    """Ray prints that its own tasks fail while it is stopped; a user would take that for an error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stop()


def descendants() -> list[psutil.Process]:
    """All processes below this one, while their parents still live: afterwards nobody can tell whose they were."""
    return psutil.Process().children(recursive=True)


def end_processes(processes: Iterable[psutil.Process], grace_s: float) -> int:
    """Wait for processes to go, then end those that did not. Returns how many had to be ended.

    psutil tells a process from a later one with the same number, so no stranger is ever hit.
    """
    _, remaining = psutil.wait_procs(list(processes), timeout=grace_s)
    for process in remaining:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(remaining, timeout=grace_s)
    return len(remaining)
