"""Keeps a process that renders templates, with hard limits on time and memory. See `gateway.text.template_process`.

A request that breaks a limit costs that process its life; the next one gets a new one. Safe to use from several
threads, one request at a time. Called by `gateway.text.chat_template`.
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

from gateway.errors import RendererBusy, TemplateStuck
from gateway.text.template_process import LENGTH

SCRIPT = Path(__file__).with_name("template_process.py")
START_TIMEOUT_S = 30.0
"""For a fresh process to import Jinja on a busy machine; not for anything of a template."""
GRACE_S = 1.0
"""How much later than the process's own alarm its parent gives up, should the alarm not work."""


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may take."""

    timeout_s: float = 2.0
    max_memory_bytes: int = 512 * 1024 * 1024
    """Address space of the whole process."""
    max_chars: int = 4 * 1024 * 1024
    """Of the rendered text."""


class TemplateRenderer:
    """A process that holds compiled templates, started when it is needed."""

    def __init__(self, sources: Mapping[str, str], limits: RenderLimits | None = None) -> None:
        """sources: templates by name."""
        self._sources, self.limits = dict(sources), limits or RenderLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._peer: socket.socket | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def compile(self) -> dict[str, str]:
        """Why templates cannot be used, by name; nothing for those that can. Raises TemplateStuck."""
        with self._lock:
            self.close()
            return self._start()

    def render(self, name: str, variables: Mapping[str, Any]) -> dict[str, str]:
        """What `template_process.render` answers. Raises TemplateStuck when a limit was broken, RendererBusy when
        renderings of others did not leave time."""
        if not self._lock.acquire(timeout=self.limits.timeout_s):
            raise RendererBusy
        try:
            if self._process is None:
                self._start()
            return self._ask({"name": name, "variables": dict(variables)}, self.limits.timeout_s + GRACE_S)
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process. Another rendering would start it again."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._peer = self._finalizer = None

    def _start(self) -> dict[str, str]:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(SCRIPT)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        self._peer = ours
        self._finalizer = weakref.finalize(self, _end, self._process, ours)
        limits = self.limits
        setup = {
            "templates": self._sources,
            "timeout_s": limits.timeout_s,
            "max_memory_bytes": limits.max_memory_bytes,
            "max_chars": limits.max_chars,
        }
        return self._ask(setup, START_TIMEOUT_S)

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, str]:
        """Exchange one message. On failure the process is ended."""
        assert self._peer is not None
        deadline = time.monotonic() + timeout_s
        content = json.dumps(message).encode()
        try:
            self._peer.settimeout(timeout_s)
            self._peer.sendall(LENGTH.pack(len(content)) + content)
            (length,) = LENGTH.unpack(self._receive(LENGTH.size, deadline))
            # JSON writes a character in at most two escapes of six bytes.
            if length > 12 * self.limits.max_chars + 65536:
                raise OSError("an answer beyond its limit")
            answer: dict[str, str] = json.loads(self._receive(length, deadline))
        except (OSError, ValueError) as error:
            self.close()
            raise TemplateStuck(f"it broke a limit of {self.limits}") from error
        except BaseException:
            self.close()
            raise
        return answer

    def _receive(self, length: int, deadline: float) -> bytes:
        assert self._peer is not None
        content = bytearray()
        while len(content) < length:
            left_s = deadline - time.monotonic()
            if left_s <= 0.0:
                raise TimeoutError
            self._peer.settimeout(left_s)
            piece = self._peer.recv(min(1 << 20, length - len(content)))
            if not piece:
                raise ConnectionError("the process has ended")
            content += piece
        return bytes(content)


def _end(process: subprocess.Popen[bytes], peer: socket.socket) -> None:
    peer.close()
    process.kill()
    process.wait()
