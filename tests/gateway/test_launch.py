"""Commands that start the service are stopped at any moment, and nothing of it stays behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.processes import end_processes

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parent.parent.parent
STOP_TIMEOUT_S = 240.0
GONE_WITHIN_S = 5.0


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command as a terminal does: in a group of its own, so that a Ctrl-C can be sent to all of it. What a
    failed test leaves running is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            end_processes(family, grace_s=0.0)
        process.communicate()


def _interrupt(
    process: subprocess.Popen[str], number: int = signal.SIGINT
) -> tuple[str, list[psutil.Process]]:
    """Ctrl-C, or a signal to the command alone. Returns what it printed, and those of its processes that are left."""
    started = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    output, _ = process.communicate(timeout=STOP_TIMEOUT_S)
    return output, _left(started)


def _wait_for_children(process: subprocess.Popen[str], count: int) -> None:
    """Until the command has started so many processes below it."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while len(psutil.Process(process.pid).children(recursive=True)) < count:
        assert process.poll() is None and time.monotonic() < deadline, "not started in time"
        time.sleep(0.05)


def _left(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that do not go: one that was killed may take a moment."""
    _, alive = psutil.wait_procs(processes, timeout=GONE_WITHIN_S)
    left = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left


@pytest.mark.parametrize("num_processes", [1, 6])
def test_interrupt_while_starting_leaves_no_process(
    start: Start, stories_store: Path, free_port: int, num_processes: int
) -> None:
    process = start("gateway.cli", "serve", str(stories_store), "--port", str(free_port), "--actors", "2")
    _wait_for_children(process, num_processes)
    output, left = _interrupt(process)
    assert process.returncode == 130, output
    assert not left
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_served_until_told_to_stop_and_then_gone(
    start: Start, stories_store: Path, free_port: int, number: int
) -> None:
    process = start("gateway.cli", "serve", str(stories_store), "--port", str(free_port))
    assert process.stdout is not None
    line = next(line for line in process.stdout if " is served at " in line)
    assert f"is served at http://127.0.0.1:{free_port}/v1" in line
    output, left = _interrupt(process, number)
    assert process.returncode == 0, output
    assert not left
    assert "Traceback" not in output


def test_port_that_is_taken_is_one_line(start: Start, stories_store: Path, taken_port: int) -> None:
    process = start("gateway.cli", "serve", str(stories_store), "--port", str(taken_port))
    output, _ = process.communicate(timeout=STOP_TIMEOUT_S)
    assert process.returncode == 1
    assert output == f"error: port {taken_port} of 127.0.0.1 is in use; choose another with --port\n"


def test_demo_prints_a_story_and_what_it_took(start: Start, stories_store: Path) -> None:
    process = start("gateway.demo.story", str(stories_store))
    output, _ = process.communicate(timeout=600.0)
    assert process.returncode == 0, output
    assert "Once upon a time there was a king" in output
    for row in ("time to first token", "tokens per second", "experts-1", "experts used"):
        assert row in output


@pytest.mark.chaos
def test_demo_of_a_kill_prints_that_the_answer_is_the_same_and_who_recovered(
    start: Start, stories_store: Path
) -> None:
    process = start("gateway.demo.kill", str(stories_store))
    output, _ = process.communicate(timeout=600.0)
    assert process.returncode == 0, output
    assert "was killed" in output
    assert "the same answer, token for token and logprob for logprob" in output
    assert len(set(re.findall(r"160, sha256 ([0-9a-f]{16})", output))) == 1
    recovered = re.search(r"experts recovered by the router\W+(\d+) of 192 that were lost", output)
    assert recovered is not None and int(recovered[1]) > 0, output
    assert re.search(r"longest gap between tokens\W+\d+ ms", output)
    assert re.search(r"replacement ready\W+[0-9.]+ s after the kill", output)


@pytest.mark.parametrize("module", ["gateway.demo.story", "gateway.demo.kill"])
def test_interrupted_demo_leaves_no_process(start: Start, stories_store: Path, module: str) -> None:
    process = start(module, str(stories_store))
    _wait_for_children(process, 8)
    _, left = _interrupt(process)
    assert process.returncode == 130
    assert not left


def test_service_that_cannot_be_deployed_says_why_in_one_line(
    start: Start, stories_store: Path, tmp_path: Path, free_port: int
) -> None:
    store = Path(shutil.copytree(stories_store, tmp_path / "store"))
    weights = store / "backbone" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    process = start("gateway.cli", "serve", str(store), "--port", str(free_port))
    output, _ = process.communicate(timeout=STOP_TIMEOUT_S)
    assert process.returncode == 1
    _, line = output.split("error: ")  # behind the table of the node's memory
    assert line.startswith("the service could not be deployed: ")
    assert "was altered" in line
    assert line.count("\n") == 1
