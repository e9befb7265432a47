"""A port that lets in who knows the cluster's secret: one thread a connection, bounded numbers of both kinds of peers.

Whatever a peer sends that the wire format does not allow closes its connection, with one line in the log, and nothing
else. Knows nothing of what is served. Used by `experts.server` (expert rows) and `experts.weight_server` (weights).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from experts.channel import Channel, TransportLimits
from experts.errors import FrameFault, LinkLost
from experts.frame import ErrorCode
from experts.handshake import DATA_PLANE, Roles, Stranger, check_secret, hear_out, refuse, welcome


@dataclass(frozen=True)
class Greeting:
    """What everybody is told who proved the secret, and what is said without being asked."""

    announcement: bytes
    """Behind the proof in the welcome."""
    incarnation: int = 0
    roles: Roles = DATA_PLANE
    heartbeat: bytes = b""
    """A whole frame, sent at every interval; none where this is empty."""
    goodbye: bytes = b""
    """A whole frame, sent when the listener stops."""


class Listener:
    """Owns the port and its connections."""

    def __init__(
        self,
        serve: Callable[[Channel], None],
        greeting: Greeting,
        *,
        secret: bytes,
        host: str,
        port: int,
        limits: TransportLimits,
        log: logging.Logger,
    ) -> None:
        """Binds at once (port 0: a free one), lets peers in from `start` on.

        serve: a welcomed peer's whole life, on its thread; ends it by raising LinkLost or FrameFault. log: of who
        serves. Raises OSError; ValueError for the secret.
        """
        check_secret(secret)
        self._serve, self._greeting, self._secret = serve, greeting, secret
        self._limits, self._log = limits, log
        self._listener = socket.create_server((host, port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._members = threading.Lock()
        self._unproven: dict[Channel, None] = {}
        self._proven: dict[Channel, bool] = {}
        """Whether the peer was welcomed, before which it expects no other frame."""
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="expert-accept", daemon=True)]
        if greeting.heartbeat:
            beat = threading.Thread(target=self._send_heartbeats, name="expert-heartbeat", daemon=True)
            self._threads.append(beat)

    @property
    def num_connections(self) -> int:
        """Connections that proved the secret."""
        return len(self._proven)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close the port and all connections; what is being served is not finished."""
        self._closing.set()
        with suppress(
            OSError
        ):  # never connected sockets refuse it on some systems; it wakes `accept` on Linux
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._members:
            if self._greeting.goodbye:
                self._tell_welcomed(self._greeting.goodbye)
            for channel in (*self._proven, *self._unproven):
                channel.end("the server stops")
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5.0)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connected, (host, port, *_) = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    self._log.warning("cannot accept a connection: %s", error)
                    self._closing.wait(0.1)  # out of descriptors, most likely: give others time to close
                continue
            self._admit(connected, f"{host}:{port}")

    def _admit(self, connected: socket.socket, peer: str) -> None:
        try:
            channel = Channel(connected, self._limits)
        except OSError as error:  # it has gone already
            self._log.warning("connection from %s ended: %s", peer, error)
            connected.close()
            return
        with self._members:
            if self._closing.is_set():  # `stop` ends only those that it finds here
                channel.close()
                return
            if len(self._unproven) >= self._limits.max_unproven:
                oldest = next(iter(self._unproven))
                del self._unproven[oldest]  # at once: its thread may take a while to notice
                oldest.end("it took too long to prove the secret, and others are waiting")
            self._unproven[channel] = None
        thread = threading.Thread(
            target=self._attend, args=(channel, peer), name=f"expert-peer-{peer}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # no more threads: must not end the one that accepts
            self._log.warning("connection from %s refused: %s", peer, error)
            self._forget(channel)

    def _attend(self, channel: Channel, peer: str) -> None:
        """A connection's whole life."""
        try:
            if self._let_in(channel, peer):
                self._serve(channel)
        except LinkLost as loss:
            if not loss.is_orderly and not self._closing.is_set():
                self._log.warning("connection from %s closed: %s", peer, loss)
        except FrameFault as fault:
            self._log.warning("connection from %s refused: %s", peer, fault)
        finally:
            self._forget(channel)

    def _let_in(self, channel: Channel, peer: str) -> bool:
        deadline_s = time.monotonic() + self._limits.handshake_timeout_s
        roles = self._greeting.roles
        stranger = hear_out(channel, self._secret, deadline_s, roles)
        code = self._enrol(channel, stranger)
        if code is not None:
            refuse(channel, code, deadline_s)
            self._log.warning("connection from %s refused: %s", peer, code.name.lower().replace("_", " "))
            return False
        welcome(channel, self._secret, stranger, self._greeting.announcement, deadline_s, roles)
        with self._members:
            self._proven[channel] = True
        return True

    def _enrol(self, channel: Channel, stranger: Stranger) -> ErrorCode | None:
        """Count a peer that proved the secret among the connections, or say why not."""
        with self._members:
            self._unproven.pop(channel, None)
            if self._closing.is_set():
                raise LinkLost("the server stops")
            if stranger.incarnation != self._greeting.incarnation:
                return ErrorCode.WRONG_INCARNATION
            if len(self._proven) >= self._limits.max_connections:
                return ErrorCode.BUSY
            self._proven[channel] = False
            return None

    def _forget(self, channel: Channel) -> None:
        with self._members:
            self._unproven.pop(channel, None)
            self._proven.pop(channel, None)
        channel.close()

    def _send_heartbeats(self) -> None:
        while not self._closing.wait(self._limits.heartbeat_interval_s):
            with self._members:
                self._tell_welcomed(self._greeting.heartbeat)

    def _tell_welcomed(self, frame: bytes) -> None:
        for channel, is_welcomed in self._proven.items():
            if is_welcomed:
                channel.send_short(frame)
