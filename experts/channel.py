"""A connected socket that carries frames, for either end of the data plane: exact reads, whole writes, heartbeats.

One thread at a time reads; any thread may send, end or ask. Reads wait in the kernel with a receive timeout of one
heartbeat interval instead of polling before every read, which saves a system call a frame. Does not look into
bodies, and knows nothing of calls. Used by `experts.handshake` and `experts.transport`.
"""

from __future__ import annotations

import math
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from experts.errors import FrameFault, LinkLost
from experts.frame import HEADER_BYTES, Header, decode_header

READ_AHEAD_BYTES = 64 * 1024
NO_BODY = memoryview(b"")
BRIEF_SPIN_S = 0.0001
LOST_CORE_S = 0.001
"""A reader that looks for bytes and was kept from it for so long is not alone on its core."""
MOST_DOUBLINGS = 10
"""Of the waits that follow without looking, where looking has brought nothing time after time."""
SHORTEST_WAIT_S = 0.001
"""A socket timeout of zero would mean no timeout."""


@dataclass(frozen=True)
class TransportLimits:
    """Bounds and clocks of the data plane. The ends need not agree on them, except for the heartbeat interval."""

    max_rows_per_frame: int = 1024
    """Output rows, and token rows, of one frame; larger calls are split, so that none holds an actor for long."""
    max_width: int = 65536
    heartbeat_interval_s: float = 0.25
    heartbeat_misses: int = 4
    """A peer that sends nothing for so many intervals is taken for lost."""
    spin_s: float = 0.0
    """How long a reader looks for bytes before it sleeps, where its last wait was no longer; else at most
    BRIEF_SPIN_S. Waking takes a thread longer than a small frame travels, a core that has slept computes slower for a
    while, and on a machine with a core for each process nobody else wants the time. Where somebody does, maybe the peer
    itself, looking is given up for a while, longer each time."""
    connect_timeout_s: float = 3.0
    handshake_timeout_s: float = 5.0
    idle_timeout_s: float = 10.0
    """A server closes a connection on which it hears nothing, heartbeats included, for this long."""
    max_unproven: int = 16
    """Connections at once that have not proved the secret; one more and the oldest of them is closed."""
    max_connections: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf and not (name == "spin_s" and value == 0):
                raise ValueError(f"{name} is {value}, must be above 0")
        if self.heartbeat_interval_s < SHORTEST_WAIT_S:
            raise ValueError(
                f"heartbeat_interval_s is {self.heartbeat_interval_s}, at least {SHORTEST_WAIT_S}"
            )

    @property
    def silence_s(self) -> float:
        return self.heartbeat_interval_s * self.heartbeat_misses


class Channel:
    """Owns one connected socket."""

    def __init__(self, connected: socket.socket, limits: TransportLimits) -> None:
        self._socket = connected
        self._tick_s = limits.heartbeat_interval_s
        self._stall_s = limits.silence_s
        self._spin_s = limits.spin_s
        self._last_wait_s = math.inf
        self._num_fruitless = self._waits_to_sleep = 0
        """How often in a row looking for bytes has brought none, and how many waits are to pass without it."""
        self._ahead = bytearray(READ_AHEAD_BYTES)
        """Bytes from `_taken` to `_filled` have arrived and were not asked for yet: one system call brings a header
        and, where it is small, what follows."""
        self._ahead_view = memoryview(self._ahead)
        self._taken = self._filled = 0
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._is_closed = False
        self._end_reason: str | None = None
        self._receive_wait_s = -1.0
        self.heard_at_s = time.monotonic()
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self._tick_s))

    def receive_header(self, deadline_s: float, silence_s: float) -> Header:
        """Wait for the next frame's header. The clock of silence restarts here: nobody listened before.

        deadline_s: on the monotonic clock. Raises LinkLost (closed, silent or late) or FrameFault.
        """
        self.heard_at_s = time.monotonic()
        if self._taken == self._filled:  # nothing was read ahead
            self._taken = self._filled = 0
            self._filled = self._receive_some(self._ahead_view, HEADER_BYTES, 0, deadline_s, silence_s)
        while (header := self._take_header()) is None:
            room = self._ahead_view[self._filled :]
            needed = HEADER_BYTES - self._filled
            self._filled += self._receive_some(room, needed, 0, deadline_s, silence_s)
        return header

    def receive_body(self, *views: memoryview, deadline_s: float, silence_s: float) -> None:
        """Fill flat byte views with what follows a header. Raises LinkLost."""
        for view in views:
            filled = min(len(view), self._filled - self._taken)
            view[:filled] = self._ahead_view[self._taken : self._taken + filled]
            self._taken += filled
            while filled < len(view):
                rest = view[filled:]
                filled += self._receive_some(rest, len(rest), socket.MSG_WAITALL, deadline_s, silence_s)

    def poll_header(self) -> Header | None:
        """A header that has arrived already, or None. Never waits. Raises LinkLost or FrameFault."""
        header = self._take_header()
        if header is not None:
            return header
        try:
            count = self._socket.recv_into(self._ahead_view[self._filled :], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._lost(error) from error
        if count == 0:
            raise self._closed(is_orderly=self._filled == 0)
        self.heard_at_s = time.monotonic()
        self._filled += count
        return self._take_header()

    def _take_header(self) -> Header | None:
        """The next header among the bytes that were read ahead, if it is whole; else those move to the front."""
        taken, held = self._taken, self._filled - self._taken
        if held >= HEADER_BYTES:
            self._taken = taken + HEADER_BYTES
            return decode_header(self._ahead_view[taken : self._taken])
        if taken:
            self._ahead[:held] = self._ahead[taken : self._filled]
            self._taken, self._filled = 0, held
        return None

    def send(self, head: bytes, body: memoryview = NO_BODY, *, deadline_s: float) -> None:
        """Send a whole frame; body: contiguous, of bytes. Raises LinkLost, after which the frame is cut in two."""
        with self._sending:
            if self._is_closed:
                raise self._closed(is_orderly=False)
            try:
                sent = self._socket.sendmsg((head, body))
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise self._lost(error) from error
            if sent != len(head) + body.nbytes:
                try:
                    self._send_rest([memoryview(head), body.cast("B")], sent, deadline_s)
                except LinkLost as loss:
                    # Before another thread may send: its heartbeat would be taken for the rest of this frame.
                    self.end(loss.reason)
                    raise

    def send_short(self, frame: bytes) -> None:
        """Send a heartbeat or goodbye without waiting; leave it out when another frame is on its way."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            if not self._is_closed and self._socket.send(frame, socket.MSG_DONTWAIT) < len(frame):
                # Half a frame is out and the rest would have to wait: the stream is of no more use.
                self.end("the peer stopped reading")
        except BlockingIOError:
            pass  # the peer has unread frames enough to know that we live
        except OSError as error:
            self.end(error.strerror or str(error))
        finally:
            self._sending.release()

    def end(self, reason: str) -> None:
        """Stop traffic both ways; a thread that waits in this channel raises LinkLost(reason). Any thread may call."""
        with self._ending:
            if self._end_reason is None:
                self._end_reason = reason
            if not self._is_closed:
                with suppress(OSError):  # the peer may have ended it first
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Release the socket. Only for the thread that reads, so that no other one's read can meet a reused number."""
        self.end("closed here")
        with self._sending, self._ending:
            self._is_closed = True
            self._socket.close()

    def _receive_some(
        self, view: memoryview, needed: int, flags: int, deadline_s: float, silence_s: float
    ) -> int:
        """Wait at most one tick for bytes; returns how many came, maybe none. needed: how many are waited for."""
        began_s = time.monotonic()
        try:
            count = self._spin(view, began_s) if self._spin_s else 0
            if not count:
                self._set_receive_wait(deadline_s)
                count = self._socket.recv_into(view, 0, flags)
        except BlockingIOError:
            now_s = time.monotonic()
            self._last_wait_s = now_s - began_s
            if now_s >= deadline_s:
                raise LinkLost("the deadline passed", kind="late") from None
            if now_s - self.heard_at_s >= silence_s:
                raise LinkLost(f"nothing heard for {now_s - self.heard_at_s:.2f} s", kind="silent") from None
            return 0
        except OSError as error:
            raise self._lost(error) from error
        if count == 0:
            raise self._closed(is_orderly=needed == HEADER_BYTES and flags == 0)
        self.heard_at_s = time.monotonic()
        self._last_wait_s = self.heard_at_s - began_s
        if self.heard_at_s >= deadline_s and count < needed:
            # Else a peer that sends byte by byte would never meet it.
            raise LinkLost("the deadline passed", kind="late")
        return count

    def _spin(self, view: memoryview, began_s: float) -> int:
        """Look for bytes again and again for a while. 0: none came, or the stream has ended or is broken."""
        if self._waits_to_sleep:
            self._waits_to_sleep -= 1
            return 0
        is_busy = self._last_wait_s <= self._spin_s
        receive, looked_s = self._socket.recv_into, began_s
        until_s = began_s + min(self._spin_s, math.inf if is_busy else BRIEF_SPIN_S)
        while True:
            try:
                count = receive(view, 0, socket.MSG_DONTWAIT)
                self._num_fruitless = 0
                return count
            except BlockingIOError:
                before_s, looked_s = looked_s, time.monotonic()
            except OSError:
                return 0
            has_lost_core = looked_s - before_s >= LOST_CORE_S
            if looked_s >= until_s or has_lost_core:
                break
        if is_busy or has_lost_core:  # else nobody has asked anything for a while
            self._num_fruitless = min(self._num_fruitless + 1, MOST_DOUBLINGS)
            self._waits_to_sleep = 2**self._num_fruitless - 1
        return 0

    def _set_receive_wait(self, deadline_s: float) -> None:
        wait_s = min(self._tick_s, max(deadline_s - time.monotonic(), SHORTEST_WAIT_S))
        if wait_s != self._receive_wait_s:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(wait_s))
            except OSError as error:
                raise self._lost(error) from error
            self._receive_wait_s = wait_s

    def _send_rest(self, rest: list[memoryview], sent: int, deadline_s: float) -> None:
        moved_at_s = time.monotonic()
        while True:
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if not rest:
                return
            rest[0] = rest[0][sent:]
            now_s = time.monotonic()
            if now_s >= deadline_s or now_s - moved_at_s >= self._stall_s:
                raise LinkLost("the peer does not read what is sent to it", kind="silent")
            try:
                sent = self._socket.sendmsg(rest)
                moved_at_s = time.monotonic()
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise self._lost(error) from error

    def _closed(self, is_orderly: bool) -> LinkLost:
        if self._end_reason is not None:
            return LinkLost(self._end_reason)
        if is_orderly:
            return LinkLost("closed by the peer", True)
        return LinkLost("closed by the peer in the middle of a frame")

    def _lost(self, error: OSError) -> LinkLost:
        return LinkLost(self._end_reason or error.strerror or str(error))


def connect(host: str, port: int, limits: TransportLimits) -> Channel:
    """Raises OSError."""
    connected = socket.create_connection((host, port), limits.connect_timeout_s)
    try:
        return Channel(connected, limits)
    except OSError:
        connected.close()
        raise


def expect_kind(header: Header, kind: int) -> None:
    """Raises FrameFault when the frame is of another kind."""
    if header.kind != kind:
        raise FrameFault(f"frame of kind {header.kind} instead of {kind}")


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, int((seconds - whole) * 1_000_000))
