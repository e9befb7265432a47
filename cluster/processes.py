"""Ends what Ray leaves running: its agents outlive a stopped Ray by minutes.

Called by `gateway.launch` and `gateway.demo`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


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
