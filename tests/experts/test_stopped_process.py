"""An actor's process that is stopped and goes on later: noticed by its missing heartbeats, its late answers refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.remote_directory import RemoteDirectory
from experts.roster import Roster
from experts.worker import ExpertWorker
from tests.experts.fleet import NAMES, assert_same, call_of, directory_over, owned_by
from tests.experts.wire_peers import endpoint_of, eventually

pytestmark = pytest.mark.usefixtures("nothing_stays")

A = NAMES[0]
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def server(tiny_store: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server's process, and its port. It takes seconds to start."""
    command = [sys.executable, "-m", "tests.experts.stopped_server", str(tiny_store), "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


@pytest.fixture
def stoppable(server: tuple[subprocess.Popen[str], int]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """It is stopped by the test and goes on after it."""
    yield server
    server[0].send_signal(signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def _stop(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    assert eventually(lambda: _is_stopped(process.pid))


def test_stopped_actor_costs_its_missing_heartbeats_and_no_deadline(
    stoppable: tuple[subprocess.Popen[str], int], local: ExpertWorker
) -> None:
    """The deadline is far off: it is the silence that ends the call, and the connection with it."""
    process, port = stoppable
    lost: list[str] = []
    roster = Roster(1, {A: endpoint_of(port, incarnation=1)}, owned_by(A))
    with directory_over(local, roster, on_lost=lost.append) as directory:
        assert_same(directory, local, call_of())
        assert directory.stats().remote_rows > 0
        _stop(process)
        assert_same(directory, local, call_of())
        assert lost == [A]
        assert directory.stats().failovers_by_kind["silent"] == 1
        assert directory.connected() == frozenset()


def test_call_that_waits_ends_when_another_thread_gives_the_connection_up(
    stoppable: tuple[subprocess.Popen[str], int], local: ExpertWorker
) -> None:
    process, port = stoppable
    owners = owned_by(A)
    with directory_over(local, Roster(1, {A: endpoint_of(port, incarnation=1)}, owners)) as directory:
        assert_same(directory, local, call_of())
        _stop(process)
        rows: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: rows.append(directory.run(call_of())), daemon=True)
        thread.start()
        assert eventually(lambda: _is_waiting(directory))
        directory.update(Roster(2, {}, owners))
        thread.join(PATIENCE_S)
        assert torch.equal(rows[0], local.compute(call_of()))


def test_actor_that_goes_on_is_heard_only_on_a_new_connection(
    stoppable: tuple[subprocess.Popen[str], int], local: ExpertWorker
) -> None:
    """It answers the call that it was stopped in; nobody takes that answer for another call's."""
    process, port = stoppable
    roster = Roster(1, {A: endpoint_of(port, incarnation=1)}, owned_by(A))
    with directory_over(local, roster) as directory:
        assert_same(directory, local, call_of())
        _stop(process)
        assert_same(directory, local, call_of(1))
        process.send_signal(signal.SIGCONT)
        deadline_s = time.monotonic() + PATIENCE_S
        while not directory.connected() and time.monotonic() < deadline_s:
            directory.update(roster)
        remote_rows = directory.stats().remote_rows
        for seed in range(2, 8):
            assert_same(directory, local, call_of(seed))
        assert directory.stats().remote_rows > remote_rows


def _is_waiting(directory: RemoteDirectory) -> bool:
    return directory.outstanding_rows(A) > 0
