"""A Ray that starts slowly, without one."""

from __future__ import annotations

import sys

import psutil
import pytest

from cluster.processes import NOT_IN_TIME, START_ATTEMPTS, started_patiently

TOO_SLOW = f"The current node {NOT_IN_TIME}. This could happen because of anything."


def test_start_that_was_not_in_time_is_tried_again_and_leaves_nothing() -> None:
    begun: list[psutil.Process] = []

    def start() -> str:
        if len(begun) == START_ATTEMPTS - 1:
            return "started"
        begun.append(psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        raise RuntimeError(TOO_SLOW)

    assert started_patiently(start) == "started"
    gone, alive = psutil.wait_procs(begun, 20.0)
    assert len(gone) == START_ATTEMPTS - 1 and not alive


@pytest.mark.parametrize(("message", "num_attempts"), [(TOO_SLOW, START_ATTEMPTS), ("no such address", 1)])
def test_error_is_the_last_attempt_s_and_another_one_is_told_at_once(message: str, num_attempts: int) -> None:
    attempts = []

    def start() -> None:
        attempts.append(1)
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message.split(".")[0]):
        started_patiently(start)
    assert len(attempts) == num_attempts
