"""An actor's end of the data plane: calls come in, rows go out.

The other end is `experts.connection`, which says what both have in common. Called by `experts.actor`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from torch import Tensor

from experts.call import ExpertCall
from experts.channel import Channel, TransportLimits
from experts.desk import Desk
from experts.errors import BudgetTooSmall, ExpertError, LinkLost, NotInGroup
from experts.frame import (
    Agreement,
    ErrorCode,
    Header,
    Kind,
    check_call,
    decode_call,
    encode_error,
    encode_header,
    map_bytes,
    rows_header,
)
from experts.frame_parts import bytes_of, check_short, new_rows, short_frame
from experts.handshake import ServiceInfo, encode_info
from experts.listener import Greeting, Listener

logger = logging.getLogger(__name__)

Compute = Callable[[ExpertCall], Tensor]
"""Returns the call's (R, D) rows in its tokens' dtype. Raises ExpertError."""


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
            heartbeat=short_frame(Kind.HEARTBEAT, self._agreed),
            goodbye=short_frame(Kind.GOODBYE, self._agreed),
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
            check_short(header, self._agreed)
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
                check_short(turn, self._agreed)
                check_call(turn, self._agreed, attendance.sequence + 1)
                raise AssertionError("a frame that may begin a call was not taken for one")
            self._answer(channel, *turn)
            channel.listen()

    def _receive_call(
        self, channel: Channel, header: Header, maps: memoryview, deadline_s: float
    ) -> ExpertCall:
        maps = maps[: map_bytes(header)]
        raw, tokens_TD = new_rows(header.num_tokens, self._agreed)
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
            answer = head, bytes_of(rows_RD, self._agreed)
        except ExpertError as error:
            logger.warning("request %s, layer %d: %s", call.request_id, call.layer, error)
            answer = (encode_error(self._agreed, sequence, _code_of(error), str(error)),)
        except Exception:  # a bug here must not end the actor; the router computes elsewhere
            logger.exception("request %s, layer %d: the call failed", call.request_id, call.layer)
            answer = (encode_error(self._agreed, sequence, ErrorCode.INTERNAL, "the call failed"),)
        if time.monotonic() >= deadline_s:
            raise LinkLost("a call was not done by its deadline")
        channel.send(*answer, deadline_s=deadline_s)


def _code_of(error: ExpertError) -> ErrorCode:
    if isinstance(error, NotInGroup):
        return ErrorCode.NOT_IN_GROUP
    return ErrorCode.BUDGET_TOO_SMALL if isinstance(error, BudgetTooSmall) else ErrorCode.EXPERT
