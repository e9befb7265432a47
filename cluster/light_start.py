"""What a process of a service is spared while it starts; what it computes is the same.

`cluster.worker_start` does it in every process that Ray starts for us, `gateway.service.launch` in the command.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

COLLECTED_FROM = 50_000
"""New objects before Python looks for unused ones, in place of 700. A start makes a million that all stay, and looking
through them a thousand times is an eighth of its work."""
UNUSED = "pandas"
"""Serve imports it where it is installed, which is a third of Serve's own import, to send data frames as JSON. No
answer of ours is one, and nothing of a service needs it."""


def start_lightly() -> None:
    """For the rest of this process."""
    gc.set_threshold(COLLECTED_FROM, *gc.get_threshold()[1:])
    sys.modules.setdefault(UNUSED, None)  # type: ignore[arg-type]  # by which Python is told that there is none


@contextmanager
def starting_lightly() -> Iterator[None]:
    """Inside only: for a process that may be somebody else's."""
    thresholds, is_there = gc.get_threshold(), UNUSED in sys.modules
    start_lightly()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not is_there:
            del sys.modules[UNUSED]
