"""Waiting for what other processes do, patiently, since the machine may be busy."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_reached: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_reached():
        assert time.monotonic() < deadline_s, "not reached in time"
        time.sleep(0.05)
