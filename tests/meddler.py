"""Stands between a router and an expert server, and does one thing to one of the answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from experts.frame import HEADER_BYTES, Header, Kind, decode_header
from experts.roster import Endpoint
from tests.experts.wire_peers import read_exactly

Deed = Callable[[socket.socket, Header, bytes], bool]
"""Given the router's end, and an answer: says in its place what it likes, and whether the connection is to live on."""


class Meddler:
    """For one connection at a time, one after another."""

    def __init__(self, behind: Endpoint) -> None:
        self._behind = behind
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = replace(behind, port=self._listener.getsockname()[1])
        self._deed: Deed | None = None
        self._skip = 0
        self.is_done = threading.Event()
        """Whether the deed is."""
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Meddler:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connected in self._sockets:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10.0)
        for connected in self._sockets:
            connected.close()

    def arm(self, deed: Deed, skip: int) -> None:
        """skip: answers to let go before."""
        self._deed, self._skip = deed, skip
        self.is_done.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection((self._behind.host, self._behind.port))
            for connected in (near, far):
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            for carry, ends in ((self._carry_up, (near, far)), (self._carry_down, (far, near))):
                self._threads.append(threading.Thread(target=carry, args=ends, daemon=True))
                self._threads[-1].start()

    def _carry_up(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                far.sendall(data)
        with suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _carry_down(self, far: socket.socket, near: socket.socket) -> None:
        with suppress(OSError):
            while self._carry_frame(far, near):
                pass
        for connected in (near, far):
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def _carry_frame(self, far: socket.socket, near: socket.socket) -> bool:
        head = read_exactly(far, HEADER_BYTES)
        header = decode_header(head)
        body = read_exactly(far, header.body_bytes)
        if self._deed is not None and header.kind == Kind.ROWS:
            self._skip -= 1
            if self._skip < 0:
                deed, self._deed = self._deed, None
                self.is_done.set()
                return deed(near, header, body)
        near.sendall(head + body)
        return True
