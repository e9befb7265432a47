"""Ray's processes: started with patience, and ended where Ray leaves them running, as its agents by minutes.

Called by whoever starts or leaves a Ray.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

T = TypeVar("T")
logger = logging.getLogger(__name__)

NOT_IN_TIME = "timed out during startup"
"""In Ray's error about a node that has not started within half a minute."""
START_ATTEMPTS = 3


def started_patiently(start: Callable[[], T]) -> T:
    """What `start` returns. Ray gives a node half a minute, which a busy machine may not keep: then what was started is
    ended, and it is tried again."""
    for _ in range(START_ATTEMPTS - 1):
        before = set(descendants())
        try:
            return start()
        except Exception as error:  # Ray raises no other
            if NOT_IN_TIME not in str(error):
                raise
        logger.warning("Ray has not started in time; it is tried again")
        end_processes([process for process in descendants() if process not in before], 0.0)
    return start()


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
