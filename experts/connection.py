"""A router's end of the data plane.

A connection carries one call at a time, answered in order; calls with more rows than a frame may hold travel in
parts. Heartbeats go both ways from threads of their own, so that a peer that hangs or is cut off is noticed while
nobody computes. Whatever a peer sends that the wire format does not allow closes its connection, with one line in
the log, and nothing else. The other end is `experts.server`. Called by `experts.links` and `experts.asking`.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import time
from collections import deque

import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.channel import Channel, TransportLimits, connect
from experts.errors import ConnectFailed, FrameFault, HandshakeRefused, LinkLost, PeerLost, RemoteExpertError
from experts.frame import (
    MAX_DEADLINE_US,
    Header,
    Kind,
    check_error,
    check_exact,
    encode_call,
    rows_header,
    split_by_rows,
)
from experts.frame_parts import bytes_of, check_short, new_rows, short_frame
from experts.handshake import check_secret, introduce
from experts.native_plane import AgreementStructure, PeerStructure
from experts.roster import Endpoint

logger = logging.getLogger(__name__)


class ExpertConnection:
    """A router's end. `start` and `finish` belong to one thread; `tend` and `close` to any."""

    def __init__(self, endpoint: Endpoint, *, secret: bytes, limits: TransportLimits | None = None) -> None:
        """Connect and agree. Raises ConnectFailed or HandshakeRefused; ValueError when the secret is too short."""
        check_secret(secret)
        self.endpoint = endpoint
        self._limits = limits or TransportLimits()
        self._channel = _connect(endpoint, self._limits)
        deadline_s = time.monotonic() + self._limits.handshake_timeout_s
        try:
            self.info, self._agreed = introduce(
                self._channel, secret, endpoint.incarnation, self._limits, deadline_s
            )
        except (LinkLost, FrameFault) as error:
            self._channel.close()
            raise HandshakeRefused(endpoint.name, str(error)) from error
        self._heartbeat = short_frame(Kind.HEARTBEAT, self._agreed)
        self._agreement = AgreementStructure.of(self._agreed)
        self._reading = threading.RLock()
        """Held from `start` to `finish`, and by whoever else looks at what arrived."""
        self._is_open = True
        self._is_asked = False
        self._sequence = 0
        self._unsent: deque[ExpertCall] = deque()
        self._num_rows_due = 0
        self._timeout_s = self._deadline_s = math.inf
        self._timeout_us = 0

    @property
    def is_open(self) -> bool:
        return self._is_open

    def start(self, call: ExpertCall, *, timeout_s: float) -> None:
        """Send a call, or its first part; `finish` must follow. timeout_s: for each part's answer.

        Raises PeerLost; ValueError when the call does not fit what was agreed, and then nothing was sent.
        """
        if not timeout_s > 0:
            raise ValueError(f"a call cannot be answered within {timeout_s} s")
        self._reading.acquire()
        try:
            self._unsent = deque(split_by_rows(call, self._agreed.max_rows))
            self._timeout_s = timeout_s
            self._timeout_us = max(1, round(min(timeout_s * 1e6, MAX_DEADLINE_US)))
            self._send_part()
            self._is_asked = True
        except (LinkLost, FrameFault) as error:
            raise self._lost(error) from error
        finally:
            if not self._is_asked:
                self._stop_reading()

    def finish(self) -> Tensor:
        """The rows of the call that was started. Raises PeerLost, or RemoteExpertError (the connection stays good)."""
        assert self._is_asked, "no call was started"
        # Until now nobody read: an answer that came in time lies there, maybe behind heartbeats.
        self._deadline_s = max(self._deadline_s, time.monotonic() + self._limits.heartbeat_interval_s)
        try:
            parts = [self._receive_rows()]
            while self._unsent:
                self._send_part()
                parts.append(self._receive_rows())
        except (LinkLost, FrameFault) as error:
            raise self._lost(error) from error
        finally:
            self._is_asked = False
            self._unsent.clear()
            self._stop_reading()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # For the C source, which asks in place of `start` and `finish` (`experts.exchange`)

    def lend(self) -> PeerStructure | None:
        """The connection, for the C source to ask by it until `take_back`, on this thread. None where it is closed."""
        self._reading.acquire()
        if not self._is_open:
            self._stop_reading()
            return None
        agreement, sequence = ctypes.addressof(self._agreement), self._sequence
        return PeerStructure(self._channel.address, agreement, 0, sequence, None)

    def take_back(self, peer: PeerStructure) -> None:
        self._sequence = peer.sequence
        self._stop_reading()

    def owe(self, num_rows: int, deadline_s: float) -> None:
        """In front of `take_back`: the last call is not answered, `finish` must follow."""
        self._reading.acquire()
        self._num_rows_due, self._deadline_s = num_rows, deadline_s
        self._is_asked = True

    def lose(self, loss: int) -> PeerLost:
        """In front of `take_back`: close after what the C source has found. loss: see `Channel.loss`."""
        return self._lost(self._channel.loss(loss))

    def component_of(self, component: str) -> int | None:
        """As the actor numbers it."""
        components = self._agreed.components
        return components.index(component) if component in components else None

    @property
    def max_rows(self) -> int:
        """Of one frame."""
        return self._agreed.max_rows

    def tend(self) -> bool:
        """Send a heartbeat, and take in the peer's unless a call is waiting. Returns whether the peer is there."""
        if not self._is_open:
            return False
        self._channel.send_short(self._heartbeat)
        if self._reading.acquire(blocking=False):
            try:
                self._hear_heartbeats()
            except (LinkLost, FrameFault) as error:
                logger.warning("%s", self._lost(error))
            finally:
                self._stop_reading()
        return self._is_open

    def close(self) -> None:
        """End the connection. A call that waits on another thread raises PeerLost there."""
        was_open, self._is_open = self._is_open, False
        if was_open:
            self._channel.send_short(short_frame(Kind.GOODBYE, self._agreed))
        self._channel.end("closed here")
        if self._reading.acquire(blocking=False):
            self._channel.close()
            if self._is_asked:  # by this same thread, or the lock would not have been free
                self._is_asked = False
                self._reading.release()
            self._reading.release()

    def _stop_reading(self) -> None:
        """Let go of the lock; if `close` was called meanwhile and could not have it, the socket is released here."""
        self._reading.release()
        if not self._is_open and self._reading.acquire(blocking=False):
            self._channel.close()
            self._reading.release()

    def _send_part(self) -> None:
        if not self._is_open:
            raise LinkLost("closed here")
        part = self._unsent.popleft()
        tokens_TD = part.tokens_TD.contiguous()
        head = encode_call(part, self._agreed, self._sequence + 1, self._timeout_us)
        self._sequence += 1
        self._num_rows_due = part.num_rows
        self._deadline_s = time.monotonic() + self._timeout_s
        self._channel.send(head, bytes_of(tokens_TD, self._agreed), deadline_s=self._deadline_s)

    def _receive_rows(self) -> Tensor:
        expected = rows_header(self._agreed, self._sequence, self._num_rows_due)
        header = self._channel.receive_header(self._deadline_s, self._limits.silence_s)
        if header != expected:
            self._look_for(expected, header)
        raw, rows_RD = new_rows(self._num_rows_due, self._agreed)
        self._receive(raw)
        return rows_RD

    def _look_for(self, expected: Header, header: Header) -> None:
        """Past heartbeats. Raises RemoteExpertError where the actor answers with an error, FrameFault, LinkLost."""
        while header != expected:
            check_short(header, self._agreed)
            if header.kind == Kind.ERROR:
                raise self._remote_error(header)
            if header.kind != Kind.HEARTBEAT:
                check_exact(header, expected)
            if time.monotonic() >= self._deadline_s:  # heartbeats without a pause would put it off for ever
                raise LinkLost("the deadline passed", kind="late")
            header = self._channel.receive_header(self._deadline_s, self._limits.silence_s)

    def _remote_error(self, header: Header) -> RemoteExpertError:
        check_error(header, self._agreed, self._sequence)
        message = bytearray(header.body_bytes)
        self._receive(memoryview(message))
        return RemoteExpertError(self.endpoint.name, header.error_code, message.decode("utf-8", "replace"))

    def _receive(self, view: memoryview) -> None:
        self._channel.receive_body(view, deadline_s=self._deadline_s, silence_s=self._limits.silence_s)

    def _hear_heartbeats(self) -> None:
        if self._is_asked or not self._is_open:
            return
        while (header := self._channel.poll_header()) is not None:
            check_short(header, self._agreed)
            if header.kind != Kind.HEARTBEAT:
                raise FrameFault(f"frame of kind {header.kind} although nothing was asked")
        self._channel.expect_heard_within(self._limits.silence_s)

    def _lost(self, error: LinkLost | FrameFault) -> PeerLost:
        self._is_open = False
        self._channel.close()
        kind = error.kind if isinstance(error, LinkLost) else "lost"
        return PeerLost(self.endpoint.name, str(error), kind)


def _connect(endpoint: Endpoint, limits: TransportLimits) -> Channel:
    try:
        return connect(endpoint.host, endpoint.port, limits)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConnectFailed(endpoint.name, endpoint.address, reason) from error
