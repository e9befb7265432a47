"""Runs `ray start` as a child: waits until the node has joined, and ends all of it in an orderly way.

Called by `sage-moe join`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from cluster.errors import ClusterRefused, NodeLost
from cluster.processes import end_processes

STARTED = "Ray runtime started"
START_TIMEOUT_S = 120.0
LEAVE_TIMEOUT_S = 45.0
"""Ray itself gives work that still runs on a node 30 s."""
KEPT_LINES = 200


def find_ray_command() -> str:
    """Of the environment that this Python belongs to. Raises ClusterRefused."""
    beside = Path(sys.executable).parent
    found = shutil.which("ray", path=os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise ClusterRefused("there is no command `ray` here", "pip install 'ray[data,serve]'")
    return found


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """For a node that outlives this command. Raises NodeLost with what Ray says."""
    result = subprocess.run(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        raise NodeLost(last_words(result.stdout.splitlines()))


class NodeProcess:
    """A node that lives as long as this object's context."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._has_said = threading.Event()
        self._child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C is for this command, which then ends the node in order
        )
        self._reader = threading.Thread(target=self._read, name="ray-start", daemon=True)
        self._reader.start()

    def wait_joined(self) -> None:
        """Raises NodeLost where Ray gives up, or does not come up in time."""
        if not self._has_said.wait(START_TIMEOUT_S):
            raise NodeLost(f"Ray did not start within {START_TIMEOUT_S:g} s")
        if not any(STARTED in line for line in self._lines):
            raise NodeLost(last_words(self._lines))

    def wait_lost(self) -> None:
        """Until the node ends by itself; then raises NodeLost."""
        self._child.wait()
        self._reader.join(LEAVE_TIMEOUT_S)
        raise NodeLost("the cluster's head is gone, or Ray was stopped here")

    def leave(self) -> None:
        """Ask Ray to leave, so that the head knows it at once; end what is left after a while."""
        processes = _family(self._child.pid)
        if self._child.poll() is None:
            self._child.terminate()
        end_processes(processes, LEAVE_TIMEOUT_S)
        self._child.wait()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.append(line)
            if STARTED in line:
                self._has_said.set()
        self._has_said.set()


@contextmanager
def running_node(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[NodeProcess]:
    """A node for as long as the context lasts. Raises NodeLost where it cannot join."""
    node = NodeProcess(command, environment)
    try:
        node.wait_joined()
        yield node
    finally:
        node.leave()


def last_words(lines: Sequence[str] | deque[str]) -> str:
    """Of what Ray printed, the line that says why: the last that is neither empty nor part of a stack."""
    words = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "\t"))]
    return words[-1] if words else "Ray said nothing"


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
