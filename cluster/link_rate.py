"""How fast two machines talk over plain TCP, on the addresses that the data plane uses: both ends.

One end listens and serves one peer that knows a secret; the other measures round trips, then bytes both ways. Bounded
in bytes and in time on both ends. That the connection stands at all proves that the node's ports are reachable.
Called by `cluster.ray_topology`; the secret travels through Ray.
"""

from __future__ import annotations

import hmac
import socket
import threading
import time
from dataclasses import dataclass

CONNECT_TIMEOUT_S = 5.0
MOST_S = 20.0
"""Of one measurement, whatever the peer does."""
NUM_PINGS = 50
CHUNK_BYTES = 1 << 20
MOST_BYTES = 64 << 20
"""One way: half a second at 1 Gb/s."""
RATE_S = 0.5
"""How long bytes flow one way at most."""
SECRET_BYTES = 32
PING, SEND, TAKE, DONE = b"P", b"S", b"T", b"D"


@dataclass(frozen=True)
class Link:
    """bandwidth_bytes_s: of the slower direction. round_trip_s: the least of some, one byte each way."""

    bandwidth_bytes_s: float
    round_trip_s: float


class LinkEnd:
    """The listening end: serves one peer, once."""

    def __init__(self, host: str, secret: bytes) -> None:
        """Raises OSError where the address cannot be bound."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._listener.settimeout(MOST_S)
        self._secret = secret
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, name="link-end", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        try:
            with self._listener:
                peer, _ = self._listener.accept()
            with peer:
                _prepare(peer)
                if hmac.compare_digest(_receive(peer, SECRET_BYTES), self._secret):
                    _obey(peer, time.monotonic() + MOST_S)
        except OSError:
            return  # the peer's end says what went wrong


def measure_link(host: str, port: int, secret: bytes) -> Link:
    """Raises OSError where the peer cannot be reached, or is lost."""
    with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S) as peer:
        _prepare(peer)
        peer.sendall(secret)
        round_trip_s = min(_ping(peer) for _ in range(NUM_PINGS))
        rate = min(_take_rate(peer), _send_rate(peer))
        peer.sendall(DONE)
    return Link(rate, round_trip_s)


def _prepare(peer: socket.socket) -> None:
    peer.settimeout(CONNECT_TIMEOUT_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _obey(peer: socket.socket, ends: float) -> None:
    """Answer pings; send chunks, each when it is asked for; take a chunk and say so."""
    chunk = bytes(CHUNK_BYTES)
    left = 2 * MOST_BYTES
    while time.monotonic() < ends and left >= 0:
        command = _receive(peer, 1)
        if command == PING:
            peer.sendall(PING)
        elif command == SEND:
            peer.sendall(chunk)
            left -= CHUNK_BYTES
        elif command == TAKE:
            _receive(peer, CHUNK_BYTES)
            peer.sendall(TAKE)
            left -= CHUNK_BYTES
        else:
            return


def _ping(peer: socket.socket) -> float:
    started = time.perf_counter()
    peer.sendall(PING)
    _receive(peer, 1)
    return time.perf_counter() - started


def _take_rate(peer: socket.socket) -> float:
    """Two chunks are asked for ahead, so that the wire is never idle."""
    started = time.perf_counter()
    peer.sendall(SEND * 2)
    num_asked, num_bytes = 2, 0
    while num_bytes < num_asked * CHUNK_BYTES:
        _receive(peer, CHUNK_BYTES)
        num_bytes += CHUNK_BYTES
        if num_asked * CHUNK_BYTES < MOST_BYTES and time.perf_counter() - started < RATE_S:
            peer.sendall(SEND)
            num_asked += 1
    return num_bytes / (time.perf_counter() - started)


def _send_rate(peer: socket.socket) -> float:
    chunk = TAKE + bytes(CHUNK_BYTES)
    started = time.perf_counter()
    num_sent, num_taken = 0, 0
    while num_taken < num_sent or not num_sent:
        is_open = num_sent * CHUNK_BYTES < MOST_BYTES and time.perf_counter() - started < RATE_S
        while is_open and num_sent - num_taken < 2:
            peer.sendall(chunk)
            num_sent += 1
        _receive(peer, 1)
        num_taken += 1
    return num_sent * CHUNK_BYTES / (time.perf_counter() - started)


def _receive(peer: socket.socket, num_bytes: int) -> bytes:
    """Exactly so many. Raises ConnectionError where the peer ends before."""
    buffer = bytearray(num_bytes)
    view, filled = memoryview(buffer), 0
    while filled < num_bytes:
        count = peer.recv_into(view[filled:])
        if not count:
            raise ConnectionError("the other end closed the connection")
        filled += count
    return bytes(buffer)
