"""Both ends of the data plane: `ExpertConnection` in a router, `ExpertServer` in an expert actor.

A connection carries one call at a time, answered in order; calls with more rows than a frame may hold travel in
parts. Heartbeats go both ways from threads of their own, so that a peer that hangs or is cut off is noticed while
nobody computes. Whatever a peer sends that the wire format does not allow closes its connection, with one line in
the log, and nothing else. Called by `experts.remote_directory` and `experts.actor`.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.channel import Channel, TransportLimits, connect
from experts.desk import Desk
from experts.errors import (
    BudgetTooSmall,
    ConnectFailed,
    ExpertError,
    FrameFault,
    HandshakeRefused,
    LinkLost,
    NotInGroup,
    PeerLost,
    RemoteExpertError,
)
from experts.frame import (
    MAX_DEADLINE_US,
    Agreement,
    ErrorCode,
    Header,
    Kind,
    check_call,
    check_error,
    check_exact,
    decode_call,
    encode_call,
    encode_error,
    encode_header,
    map_bytes,
    rows_header,
    split_by_rows,
)
from experts.handshake import ServiceInfo, check_secret, encode_info, introduce
from experts.listener import Greeting, Listener
from experts.native_plane import AgreementStructure, PeerStructure
from experts.roster import Endpoint

__all__ = ["ExpertConnection", "ExpertServer", "ServiceInfo", "TransportLimits"]

logger = logging.getLogger(__name__)

Compute = Callable[[ExpertCall], Tensor]
"""Returns the call's (R, D) rows in its tokens' dtype. Raises ExpertError."""


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
        self._heartbeat = _short_frame(Kind.HEARTBEAT, self._agreed)
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
            self._channel.send_short(_short_frame(Kind.GOODBYE, self._agreed))
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
        self._channel.send(head, _bytes_of(tokens_TD, self._agreed), deadline_s=self._deadline_s)

    def _receive_rows(self) -> Tensor:
        expected = rows_header(self._agreed, self._sequence, self._num_rows_due)
        header = self._channel.receive_header(self._deadline_s, self._limits.silence_s)
        if header != expected:
            self._look_for(expected, header)
        raw, rows_RD = _new_rows(self._num_rows_due, self._agreed)
        self._receive(raw)
        return rows_RD

    def _look_for(self, expected: Header, header: Header) -> None:
        """Past heartbeats. Raises RemoteExpertError where the actor answers with an error, FrameFault, LinkLost."""
        while header != expected:
            _check_short(header, self._agreed)
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
            _check_short(header, self._agreed)
            if header.kind != Kind.HEARTBEAT:
                raise FrameFault(f"frame of kind {header.kind} although nothing was asked")
        self._channel.expect_heard_within(self._limits.silence_s)

    def _lost(self, error: LinkLost | FrameFault) -> PeerLost:
        self._is_open = False
        self._channel.close()
        kind = error.kind if isinstance(error, LinkLost) else "lost"
        return PeerLost(self.endpoint.name, str(error), kind)


class ExpertServer:
    """An actor's end: listens, lets in who knows the secret, computes calls, one thread a connection."""

    def __init__(
        self,
        compute: Compute,
        info: ServiceInfo,
        *,
        secret: bytes,
        incarnation: int,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: TransportLimits | None = None,
        desk: Desk | None = None,
    ) -> None:
        """Binds at once (port 0: a free one), lets peers in from `start` on.

        desk: where calls may be computed instead; whose components and rows must be the info's.
        Raises OSError; ValueError for the secret, or for an info that cannot be announced.
        """
        if desk is not None and (desk.components, desk.width, desk.dtype) != (
            *(info.components, info.width, info.dtype),
        ):
            raise ValueError(f"a desk for {desk.components} does not serve {info.components}")
        self._compute, self._desk = compute, desk
        self._limits = limits or TransportLimits()
        max_rows = self._limits.max_rows_per_frame
        self._agreed = Agreement(incarnation, info.width, info.dtype, info.components, max_rows)
        greeting = Greeting(
            encode_info(info, max_rows),
            incarnation,
            heartbeat=_short_frame(Kind.HEARTBEAT, self._agreed),
            goodbye=_short_frame(Kind.GOODBYE, self._agreed),
        )
        self._listener = Listener(
            self._serve, greeting, secret=secret, host=host, port=port, limits=self._limits, log=logger
        )

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def num_connections(self) -> int:
        """Connections that proved the secret."""
        return self._listener.num_connections

    def start(self) -> None:
        self._listener.start()

    def stop(self) -> None:
        """Close the port and all connections; calls in progress are not answered."""
        self._listener.stop()

    def _serve(self, channel: Channel) -> None:
        """Answer calls until the peer leaves."""
        if self._desk is not None:
            self._attend(channel, self._desk)
            return
        sequence = 0
        maps = bytearray(self._agreed.max_map_bytes)
        while True:
            header = channel.receive_header(math.inf, self._limits.idle_timeout_s)
            _check_short(header, self._agreed)
            if header.kind == Kind.HEARTBEAT:
                continue
            sequence += 1
            check_call(header, self._agreed, sequence)
            deadline_s = time.monotonic() + header.deadline_us / 1e6
            call = self._receive_call(channel, header, memoryview(maps), deadline_s)
            self._answer(channel, call, sequence, deadline_s)

    def _attend(self, channel: Channel, desk: Desk) -> None:
        """The same where the C source answers most calls."""
        attendance = desk.attend(channel, self._agreed, self._limits.silence_s)
        channel.listen()
        while True:
            turn = attendance.serve()
            if turn is None:
                channel.expect_heard_within(self._limits.idle_timeout_s)
                continue
            if isinstance(turn, Header):
                _check_short(turn, self._agreed)
                check_call(turn, self._agreed, attendance.sequence + 1)
                raise AssertionError("a frame that may begin a call was not taken for one")
            self._answer(channel, *turn)
            channel.listen()

    def _receive_call(
        self, channel: Channel, header: Header, maps: memoryview, deadline_s: float
    ) -> ExpertCall:
        maps = maps[: map_bytes(header)]
        raw, tokens_TD = _new_rows(header.num_tokens, self._agreed)
        channel.receive_body(maps, raw, deadline_s=deadline_s, silence_s=self._limits.silence_s)
        return decode_call(header, maps, self._agreed, tokens_TD)

    def _answer(self, channel: Channel, call: ExpertCall, sequence: int, deadline_s: float) -> None:
        answer: tuple[bytes | memoryview, ...]
        try:
            rows_RD = self._compute(call).contiguous()
            shape = call.num_rows, self._agreed.width
            if rows_RD.shape != shape or rows_RD.dtype != self._agreed.dtype or not rows_RD.is_cpu:
                raise ValueError(f"rows {tuple(rows_RD.shape)} in {rows_RD.dtype} for {shape}")
            head = encode_header(rows_header(self._agreed, sequence, call.num_rows))
            answer = head, _bytes_of(rows_RD, self._agreed)
        except ExpertError as error:
            logger.warning("request %s, layer %d: %s", call.request_id, call.layer, error)
            answer = (encode_error(self._agreed, sequence, _code_of(error), str(error)),)
        except Exception:  # a bug here must not end the actor; the router computes elsewhere
            logger.exception("request %s, layer %d: the call failed", call.request_id, call.layer)
            answer = (encode_error(self._agreed, sequence, ErrorCode.INTERNAL, "the call failed"),)
        if time.monotonic() >= deadline_s:
            raise LinkLost("a call was not done by its deadline")
        channel.send(*answer, deadline_s=deadline_s)


def _connect(endpoint: Endpoint, limits: TransportLimits) -> Channel:
    try:
        return connect(endpoint.host, endpoint.port, limits)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConnectFailed(endpoint.name, endpoint.address, reason) from error


def _short_frame(kind: Kind, agreed: Agreement) -> bytes:
    return encode_header(Header(kind, incarnation=agreed.incarnation))


def _check_short(header: Header, agreed: Agreement) -> None:
    """Heartbeats must be exactly that; a goodbye raises LinkLost. Other frames are the caller's to check."""
    if header.kind in (Kind.HEARTBEAT, Kind.GOODBYE):
        check_exact(header, Header(header.kind, incarnation=agreed.incarnation))
        if header.kind == Kind.GOODBYE:
            raise LinkLost("the peer said goodbye", True)


def _code_of(error: ExpertError) -> ErrorCode:
    if isinstance(error, NotInGroup):
        return ErrorCode.NOT_IN_GROUP
    return ErrorCode.BUDGET_TOO_SMALL if isinstance(error, BudgetTooSmall) else ErrorCode.EXPERT


def _new_rows(num_rows: int, agreed: Agreement) -> tuple[memoryview, Tensor]:
    """Memory for rows, as flat bytes and as a (rows, D) tensor."""
    rows_RD = torch.empty(num_rows, agreed.width, dtype=agreed.dtype)
    return _memory_of(rows_RD, num_rows * agreed.row_bytes), rows_RD


def _bytes_of(rows_RD: Tensor, agreed: Agreement) -> memoryview:
    """The memory of contiguous rows on the CPU."""
    return _memory_of(rows_RD, rows_RD.shape[0] * agreed.row_bytes)


def _memory_of(tensor: Tensor, nbytes: int) -> memoryview:
    """Good for as long as the tensor is. By its address: on this path, which runs between two waits, each call into
    PyTorch costs several times what it costs in a loop."""
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
