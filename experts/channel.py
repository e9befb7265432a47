"""A connected socket that carries frames, for either end of the data plane: exact reads, whole writes, heartbeats.

One thread at a time reads; any thread may send, end or ask. Reads wait in the kernel with a receive timeout of one
heartbeat interval instead of polling before every read, which saves a system call a frame. Where the C source is, it
waits, and looks for bytes for a while before it sleeps (`native/stream.c`). What has arrived lies in a structure that
it reads as well, so that whole exchanges of frames can go on there. Does not look into bodies, and knows nothing of
calls. Used by `experts.handshake`, `experts.connection`, `experts.server`, `experts.desk` and `experts.exchange`.
"""

from __future__ import annotations

import ctypes
import math
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from experts.errors import FrameFault, LinkLost, LossKind
from experts.frame import HEADER_BYTES, Header, decode_header
from experts.native_plane import FOREVER_NS, StreamStructure, new_lock, plane

READ_AHEAD_BYTES = 64 * 1024
NO_BODY = memoryview(b"")
BRIEF_SPIN_S = 0.0001
LOST_CORE_S = 0.001
"""A reader that looks for bytes and was kept from it for so long is not alone on its core."""
MOST_DOUBLINGS = 10
"""Of the waits that follow without looking, where looking has brought nothing time after time."""
SHORTEST_WAIT_S = 0.001
"""A socket timeout of zero would mean no timeout."""
LOSSES: dict[int, tuple[str, LossKind]] = {
    2: ("the deadline passed", "late"),
    3: ("nothing heard for {silent_s:.2f} s", "silent"),
    4: ("the peer does not read what is sent to it", "silent"),
}
"""By the numbers of `loss` in native/stream.h: why a stream carries no more."""
ENDED, CUT = 1, 6
"""The same: the peer has closed it, the latter in the middle of a frame."""


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
        self._ahead = bytearray(READ_AHEAD_BYTES)
        """Bytes from `taken` to `filled` have arrived and were not asked for yet: one system call brings a header
        and, where it is small, what follows."""
        self._ahead_view = memoryview(self._ahead)
        self._plane = plane()
        self._sending, lock_address = new_lock()
        self.state = StreamStructure(
            *(lock_address, _address_of(self._ahead_view), READ_AHEAD_BYTES, 0, 0, connected.fileno()),
            *map(to_ns, (self._tick_s, self._stall_s, limits.spin_s, BRIEF_SPIN_S, LOST_CORE_S)),
            *(MOST_DOUBLINGS, FOREVER_NS, 0, 0, -1, time.monotonic_ns(), 0),
        )
        self.address = ctypes.addressof(self.state)
        """Of the state, for the C source; only for the thread that reads."""
        self._ending = threading.Lock()
        self._is_closed = False
        self._end_reason: str | None = None
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self._tick_s))

    @property
    def heard_at_s(self) -> float:
        """When the last bytes came, on the monotonic clock; or since when they are waited for."""
        return self.state.heard_at_ns * 1e-9  # type: ignore[no-any-return]

    def listen(self) -> None:
        """Restart the clock of silence: nobody listened before."""
        self.state.heard_at_ns = time.monotonic_ns()

    def expect_heard_within(self, silence_s: float) -> None:
        """Raises LinkLost where the peer has been silent for longer."""
        silent_s = time.monotonic() - self.heard_at_s
        if silent_s >= silence_s:
            raise LinkLost(f"nothing heard for {silent_s:.2f} s", kind="silent")

    def receive_header(self, deadline_s: float, silence_s: float) -> Header:
        """Wait for the next frame's header. The clock of silence restarts here: nobody listened before.

        deadline_s: on the monotonic clock. Raises LinkLost (closed, silent or late) or FrameFault.
        """
        self.listen()
        state = self.state
        if state.taken == state.filled:  # nothing was read ahead
            state.taken = state.filled = 0
            state.filled = self._receive_some(self._ahead_view, HEADER_BYTES, 0, deadline_s, silence_s)
        while (header := self._take_header()) is None:
            filled = state.filled
            needed = HEADER_BYTES - filled
            room = self._ahead_view[filled:]
            state.filled = filled + self._receive_some(room, needed, 0, deadline_s, silence_s)
        return header

    def receive_body(self, *views: memoryview, deadline_s: float, silence_s: float) -> None:
        """Fill flat byte views with what follows a header. Raises LinkLost."""
        state = self.state
        for view in views:
            taken = state.taken
            filled = min(len(view), state.filled - taken)
            view[:filled] = self._ahead_view[taken : taken + filled]
            state.taken = taken + filled
            while filled < len(view):
                rest = view[filled:]
                filled += self._receive_some(rest, len(rest), socket.MSG_WAITALL, deadline_s, silence_s)

    def poll_header(self) -> Header | None:
        """A header that has arrived already, or None. Never waits. Raises LinkLost or FrameFault."""
        header = self._take_header()
        if header is not None:
            return header
        state = self.state
        try:
            count = self._socket.recv_into(self._ahead_view[state.filled :], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._lost(error) from error
        if count == 0:
            raise self._closed(is_orderly=state.filled == 0)
        self.listen()
        state.filled += count
        return self._take_header()

    def _take_header(self) -> Header | None:
        """The next header among the bytes that were read ahead, if it is whole; else those move to the front."""
        state = self.state
        taken, filled = state.taken, state.filled
        held = filled - taken
        if held >= HEADER_BYTES:
            state.taken = taken + HEADER_BYTES
            return decode_header(self._ahead_view[taken : taken + HEADER_BYTES])
        if taken:
            self._ahead_view[:held] = self._ahead[taken:filled]
            state.taken, state.filled = 0, held
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
            self.state.fd = -1
            self._socket.close()

    def loss(self, number: int) -> LinkLost:
        """What the C source found. number: of `loss` in native/stream.h."""
        state = self.state
        if self._end_reason is None and number in LOSSES:
            reason, kind = LOSSES[number]
            return LinkLost(reason.format(silent_s=time.monotonic() - self.heard_at_s), kind=kind)
        if number in (ENDED, CUT):
            return self._closed(is_orderly=number == ENDED and state.taken == state.filled)
        return LinkLost(self._end_reason or os.strerror(state.error))

    def _receive_some(
        self, view: memoryview, needed: int, flags: int, deadline_s: float, silence_s: float
    ) -> int:
        """Wait at most one tick for bytes; returns how many came, maybe none. needed: how many are waited for."""
        try:
            count = self._receive_in_tick(view, flags, deadline_s)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise LinkLost("the deadline passed", kind="late") from None
            self.expect_heard_within(silence_s)
            return 0
        except OSError as error:
            raise self._lost(error) from error
        if count == 0:
            raise self._closed(is_orderly=needed == HEADER_BYTES and flags == 0)
        self.listen()
        if count < needed and time.monotonic() >= deadline_s:
            # Else a peer that sends byte by byte would never meet it.
            raise LinkLost("the deadline passed", kind="late")
        return count

    def _receive_in_tick(self, view: memoryview, flags: int, deadline_s: float) -> int:
        """Raises BlockingIOError where nothing came, OSError."""
        if self._plane is None:
            self._set_receive_wait(deadline_s)
            return self._socket.recv_into(view, 0, flags)
        count = self._plane.receive(self.address, _address_of(view), len(view), flags, to_ns(deadline_s))
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return count

    def _set_receive_wait(self, deadline_s: float) -> None:
        wait_s = min(self._tick_s, max(deadline_s - time.monotonic(), SHORTEST_WAIT_S))
        if to_ns(wait_s) != self.state.receive_wait_ns:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(wait_s))
            self.state.receive_wait_ns = to_ns(wait_s)

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


def to_ns(seconds: float) -> int:
    return FOREVER_NS if seconds == math.inf else round(seconds * 1e9)


def _address_of(view: memoryview) -> int:
    """Of memory that can be written to."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, int((seconds - whole) * 1_000_000))
