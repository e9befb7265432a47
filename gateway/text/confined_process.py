"""A process for work on what comes from strangers: run as a script, with a socket as its standard input.

The kernel ends it when a message takes too long (an alarm nobody catches, which also ends it after its parent has gone)
and refuses memory beyond a limit. Imports nothing of ours but the task, a file that its argument names: it is started
with an empty environment and path.

A message either way is 8 bytes of length and JSON. First come the limits and what the task is to be prepared with,
then messages; each is answered with what the task makes of it. Kept by `gateway.text.confined`.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import signal
import socket
import struct
import sys
from types import ModuleType
from typing import Any

LENGTH = struct.Struct("<Q")


def main() -> None:
    """Serve until the other end of standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    peer = socket.socket(fileno=sys.stdin.fileno())
    setup = _receive(peer)
    task = _load(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (setup["max_memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])
    told, answer = task.prepare(setup["task"])
    signal.setitimer(signal.ITIMER_REAL, 0)
    _send(peer, told)
    while True:
        message = _receive(peer)
        signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])
        _send(peer, answer(message))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("task", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _receive(peer: socket.socket) -> dict[str, Any]:
    (length,) = LENGTH.unpack(_receive_exactly(peer, LENGTH.size))
    value: dict[str, Any] = json.loads(_receive_exactly(peer, length))
    return value


def _receive_exactly(peer: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        piece = peer.recv(min(1 << 20, length - len(content)))
        if not piece:
            sys.exit(0)
        content += piece
    return bytes(content)


def _send(peer: socket.socket, value: dict[str, Any]) -> None:
    content = json.dumps(value).encode()
    peer.sendall(LENGTH.pack(len(content)) + content)


if __name__ == "__main__":
    main()
