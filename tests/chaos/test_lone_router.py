"""The only router of a service hangs in the middle of an answer: it is ended and replaced, and the answer goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from gateway.demo.ports import free_port
from gateway.service.launch import ServiceOptions, running_service
from tests.chaos.service_under_fire import wait_for
from tests.chaos.trials import MODEL, read_answer

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]

MAX_TOKENS = 200
OVERLOAD_S = 20.0
MOST_STALL_S = 45.0
"""Three missed checks of 4 s, and a new process, on a machine that does other things too."""


@pytest.fixture(scope="module")
def url(stories_store: Path) -> Iterator[str]:
    options = ServiceOptions(
        stories_store, MODEL, port=free_port(), num_actors=1, num_cpus=2, resume_timeout_s=120
    )
    with running_service(options) as url:
        yield url


def test_router_on_an_overloaded_machine_is_not_taken_for_dead(url: str) -> None:
    """Longer than three of its checks, with ten processes for each core."""
    *_, undisturbed = read_answer(url, 1, 0, MAX_TOKENS)
    pid = httpx.get(f"{url}/sage/status", timeout=30.0).json()["router"]["pid"]
    idlers = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(10 * (os.cpu_count() or 1))
    ]
    try:
        until_s = time.monotonic() + OVERLOAD_S
        while time.monotonic() < until_s:
            *_, answer = read_answer(url, 1, 0, MAX_TOKENS)
            assert answer.content() == undisturbed.content()
    finally:
        for idler in idlers:
            idler.kill()
            idler.wait()
    assert httpx.get(f"{url}/sage/status", timeout=30.0).json()["router"]["pid"] == pid


def test_answer_of_a_lone_router_that_hangs_goes_on_in_the_next(url: str) -> None:
    *_, undisturbed = read_answer(url, 0, 0, MAX_TOKENS)
    pid = httpx.get(f"{url}/sage/status", timeout=30.0).json()["router"]["pid"]
    stopped_at_s = 0.0
    for answer in read_answer(url, 0, 0, MAX_TOKENS):
        if len(answer.tokens) > 20 and not stopped_at_s:
            stopped_at_s = time.monotonic()
            os.kill(pid, signal.SIGSTOP)
    assert answer.content() == undisturbed.content()
    assert max(answer.gaps_s(stopped_at_s - 1.0)) < MOST_STALL_S
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
