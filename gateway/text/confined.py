"""Keeps a process that works on what comes from strangers, with hard limits on time and memory.

A message that breaks a limit costs that process its life; the next one gets a new one. Safe to use from several
threads, one message at a time. See `gateway.text.confined_process`; used by `gateway.text.template_renderer` and
`gateway.text.grammar_check`.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.errors import LimitBroken, PreparationBusy
from gateway.text.confined_process import LENGTH

SCRIPT = Path(__file__).with_name("confined_process.py")
START_TIMEOUT_S = 30.0
"""For a fresh process to import what its task needs on a busy machine; not for anything of a stranger's."""
GRACE_S = 1.0
"""How much later than the process's own alarm its parent gives up, should the alarm not work."""


@dataclass(frozen=True)
class Confinement:
    """What one message may take."""

    timeout_s: float = 2.0
    max_memory_bytes: int = 512 * 1024 * 1024
    """Address space of the whole process."""
    max_answer_bytes: int = 1024 * 1024


class ConfinedProcess:
    """A process with a prepared task, started when it is needed."""

    def __init__(self, task: Path, setup: Mapping[str, Any], limits: Confinement) -> None:
        """task: a Python file with `prepare`, which is given the setup and returns what `start` returns and a function
        from a message to its answer."""
        self._task, self._setup, self.limits = task, dict(setup), limits
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.peer: socket.socket | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def start(self) -> dict[str, Any]:
        """What the preparation of a fresh process told. Raises LimitBroken."""
        with self.lock:
            self.close()
            return self._start()

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer. Raises LimitBroken, or PreparationBusy when messages of others did not leave time."""
        if not self.lock.acquire(timeout=self.limits.timeout_s):
            raise PreparationBusy
        try:
            if self.process is None or self.process.poll() is not None:
                self.close()  # ended by somebody else: no message is to blame
                self._start()
            return self._exchange(dict(message), self.limits.timeout_s + GRACE_S)
        finally:
            self.lock.release()

    def close(self) -> None:
        """End the process. Another message would start it again."""
        if self._finalizer is not None:
            self._finalizer()
        self.process = self.peer = self._finalizer = None

    def _start(self) -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(SCRIPT), str(self._task)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        self.peer = ours
        self._finalizer = weakref.finalize(self, _end, self.process, ours)
        setup = {
            "task": self._setup,
            "timeout_s": self.limits.timeout_s,
            "max_memory_bytes": self.limits.max_memory_bytes,
        }
        return self._exchange(setup, START_TIMEOUT_S)

    def _exchange(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """One message. On failure the process is ended."""
        assert self.peer is not None
        deadline = time.monotonic() + timeout_s
        content = json.dumps(message).encode()
        try:
            self.peer.settimeout(timeout_s)
            self.peer.sendall(LENGTH.pack(len(content)) + content)
            (length,) = LENGTH.unpack(self._receive(LENGTH.size, deadline))
            if length > self.limits.max_answer_bytes:
                raise OSError("an answer beyond its limit")
            answer: dict[str, Any] = json.loads(self._receive(length, deadline))
        except (OSError, ValueError) as error:
            self.close()
            raise LimitBroken(str(self.limits)) from error
        except BaseException:
            self.close()
            raise
        return answer

    def _receive(self, length: int, deadline: float) -> bytes:
        assert self.peer is not None
        content = bytearray()
        while len(content) < length:
            left_s = deadline - time.monotonic()
            if left_s <= 0.0:
                raise TimeoutError
            self.peer.settimeout(left_s)
            piece = self.peer.recv(min(1 << 20, length - len(content)))
            if not piece:
                raise ConnectionError("the process has ended")
            content += piece
        return bytes(content)


def _end(process: subprocess.Popen[bytes], peer: socket.socket) -> None:
    peer.close()
    process.kill()
    process.wait()
