"""What a router does with actors that break the rules."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import pytest
import torch

from experts.call import ExpertCall
from experts.channel import Channel
from experts.connection import ExpertConnection
from experts.errors import (
    ConnectFailed,
    HandshakeRefused,
    PeerLost,
    RemoteExpertError,
)
from experts.frame import (
    HEADER_BYTES,
    Header,
    Kind,
    encode_error,
    encode_header,
    rows_header,
)
from experts.handshake import encode_info
from tests.experts.wire_peers import (
    AGREED,
    INCARNATION,
    INFO,
    QUICK,
    SECRET,
    SHY,
    SLACK_S,
    WIDTH,
    FakeActor,
    RawRouter,
    ask,
    assert_one_line,
    assert_serves,
    connecting,
    endpoint_of,
    eventually,
    hear_frame,
    heartbeat,
    make_call,
    serving,
)

pytestmark = pytest.mark.usefixtures("nothing_stays")


def _hang(connected: socket.socket) -> None:
    """Read everything, say nothing."""
    while connected.recv(1 << 16):
        pass


def test_actor_that_falls_silent_is_noticed_while_a_call_waits() -> None:
    with FakeActor(_hang) as actor, connecting(actor.port, limits=QUICK) as link:
        started_s = time.monotonic()
        with pytest.raises(PeerLost, match="nothing heard"):
            ask(link, make_call())
        assert QUICK.silence_s <= time.monotonic() - started_s < QUICK.silence_s + SLACK_S


def test_actor_that_falls_silent_is_noticed_while_nobody_asks() -> None:
    with FakeActor(_hang) as actor, connecting(actor.port, limits=QUICK) as link:
        started_s = time.monotonic()
        assert eventually(lambda: not link.tend())
        assert QUICK.silence_s * 0.9 <= time.monotonic() - started_s < QUICK.silence_s + SLACK_S


def test_actor_that_only_sends_heartbeats_is_late_in_time() -> None:
    def beat(connected: socket.socket) -> None:
        while True:
            connected.sendall(heartbeat() * 50)

    with FakeActor(beat) as actor, connecting(actor.port, limits=QUICK) as link:
        started_s = time.monotonic()
        with pytest.raises(PeerLost, match="the deadline passed"):
            ask(link, make_call(), timeout_s=0.2)
        assert time.monotonic() - started_s < 0.2 + SLACK_S
        link.close()


def test_actor_that_answers_byte_by_byte_is_late_in_time() -> None:
    def trickle(connected: socket.socket) -> None:
        hear_frame(connected)
        for byte in encode_header(rows_header(AGREED, 1, 3)) + bytes(3 * 4 * WIDTH):
            connected.sendall(bytes([byte]))
            time.sleep(0.01)

    with FakeActor(trickle) as actor, connecting(actor.port, limits=QUICK) as link:
        started_s = time.monotonic()
        with pytest.raises(PeerLost, match="the deadline passed"):
            ask(link, make_call(), timeout_s=0.3)
        assert time.monotonic() - started_s < 0.3 + SLACK_S


def test_actor_that_stops_reading_is_let_go() -> None:
    num_rows = 1 << 20
    limits = replace(QUICK, max_rows_per_frame=num_rows)

    def beat(connected: socket.socket) -> None:
        while not actor.is_done.wait(0.02):
            connected.sendall(heartbeat())

    with (
        FakeActor(beat, info=encode_info(INFO, num_rows)) as actor,
        connecting(actor.port, limits=limits) as link,
    ):
        call = ExpertCall("model", 0, (1,), (num_rows,), (0,) * num_rows, torch.zeros(num_rows, WIDTH))
        started_s = time.monotonic()
        with pytest.raises(PeerLost, match="does not read"):
            ask(link, call)
        assert time.monotonic() - started_s < 2 * SLACK_S


ROWS = rows_header(AGREED, 1, 3)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (ROWS._replace(sequence=0), "sequence is 0 instead of 1"),
        (ROWS._replace(sequence=2), "sequence is 2 instead of 1"),
        (ROWS._replace(incarnation=INCARNATION - 1), "incarnation is 6 instead of 7"),
        (ROWS._replace(num_rows=2), "num_rows is 2 instead of 3"),
        (ROWS._replace(num_rows=2**32 - 1, body_bytes=2**32 - 1), "num_rows"),
        (ROWS._replace(body_bytes=2**32 - 1), "body_bytes"),
        (ROWS._replace(width=WIDTH + 1), "width"),
        (ROWS._replace(dtype_code=3), "dtype_code"),
        (ROWS._replace(kind=Kind.CALL), "kind"),
        (ROWS._replace(kind=Kind.WELCOME), "kind"),
        (Header(Kind.HEARTBEAT, incarnation=INCARNATION - 1), "incarnation"),
        (Header(Kind.HEARTBEAT, incarnation=INCARNATION, body_bytes=9), "body_bytes"),
        (Header(Kind.ERROR, 0, incarnation=INCARNATION, sequence=1), "without a code"),
        (Header(Kind.ERROR, error_code=2, incarnation=INCARNATION, sequence=2), "sequence"),
        (
            Header(Kind.ERROR, error_code=2, incarnation=INCARNATION, sequence=1, body_bytes=2**32 - 1),
            "error message of 4294967295 bytes",
        ),
    ],
)
def test_answer_with_a_wrong_header_ends_the_connection(header: Header, message: str) -> None:
    def answer(connected: socket.socket) -> None:
        hear_frame(connected)
        connected.sendall(encode_header(header) + bytes(3 * 4 * WIDTH))
        _hang(connected)

    with FakeActor(answer) as actor, connecting(actor.port) as link:
        with pytest.raises(PeerLost, match=message):
            ask(link, make_call(3))
        assert not link.is_open


def test_answer_that_nobody_asked_for_ends_the_connection(warnings: list[str]) -> None:
    def answer(connected: socket.socket) -> None:
        connected.sendall(encode_header(ROWS) + bytes(3 * 4 * WIDTH))
        _hang(connected)

    with FakeActor(answer) as actor, connecting(actor.port) as link:
        assert eventually(lambda: not link.tend())
        assert_one_line(warnings, "although nothing was asked")


def test_answer_of_an_earlier_call_is_never_taken() -> None:
    """Two answers to the first call: the second must not be the answer to the second call."""

    def answer_twice(connected: socket.socket) -> None:
        hear_frame(connected)
        connected.sendall(2 * (encode_header(ROWS) + bytes(3 * 4 * WIDTH)))
        _hang(connected)

    with FakeActor(answer_twice) as actor, connecting(actor.port) as link:
        assert torch.equal(ask(link, make_call(3)), torch.zeros(3, WIDTH))
        with pytest.raises(PeerLost, match="sequence is 1 instead of 2"):
            ask(link, make_call(3))


def test_unknown_error_code_is_an_error_answer() -> None:
    def answer(connected: socket.socket) -> None:
        hear_frame(connected)
        connected.sendall(encode_error(AGREED, 1, 4711, "\x1b[31mwhat"))
        hear_frame(connected)
        connected.sendall(encode_header(rows_header(AGREED, 2, 3)) + bytes(3 * 4 * WIDTH))
        _hang(connected)

    with FakeActor(answer) as actor, connecting(actor.port) as link:
        with pytest.raises(RemoteExpertError, match="error 4711"):
            ask(link, make_call(3))
        assert torch.equal(ask(link, make_call(3)), torch.zeros(3, WIDTH))


@pytest.mark.parametrize("num_bytes", [0, 1, HEADER_BYTES, HEADER_BYTES + 5])
def test_actor_that_dies_in_its_answer_is_lost_at_once(num_bytes: int) -> None:
    def answer(connected: socket.socket) -> None:
        hear_frame(connected)
        connected.sendall((encode_header(ROWS) + bytes(3 * 4 * WIDTH))[:num_bytes])

    with FakeActor(answer) as actor, connecting(actor.port) as link:
        started_s = time.monotonic()
        with pytest.raises(PeerLost, match="closed by the peer"):
            ask(link, make_call(3))
        assert time.monotonic() - started_s < SLACK_S


def test_actor_that_does_not_know_the_secret_is_refused() -> None:
    with (
        FakeActor(_hang, secret=b"another secret of some length") as actor,
        pytest.raises(HandshakeRefused, match="the actor does not know the secret"),
    ):
        ExpertConnection(endpoint_of(actor.port), secret=SECRET)


def test_actor_of_another_incarnation_is_refused() -> None:
    with (
        FakeActor(_hang, incarnation=INCARNATION + 1) as actor,
        pytest.raises(HandshakeRefused, match="incarnation is 8 instead of 7"),
    ):
        ExpertConnection(endpoint_of(actor.port), secret=SECRET)


def test_listener_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started_s = time.monotonic()
        with pytest.raises(HandshakeRefused, match="the deadline passed"):
            ExpertConnection(endpoint_of(listener.getsockname()[1]), secret=SECRET, limits=SHY)
        assert time.monotonic() - started_s < SHY.handshake_timeout_s + SLACK_S


def test_address_where_nobody_listens_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectFailed, match=f"127.0.0.1:{port}: Connection refused"):
        ExpertConnection(endpoint_of(port), secret=SECRET)


def test_socket_of_a_peer_that_left_at_once_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(107, "Transport endpoint is not connected")

    with serving() as server:
        for module in ("experts.channel", "experts.listener"):
            monkeypatch.setattr(f"{module}.Channel", refuse)
        with pytest.raises(ConnectFailed, match="not connected"):
            ExpertConnection(endpoint_of(server.port), secret=SECRET)
        with RawRouter(server.port) as router:
            assert router.is_closed_within(5.0)
        for module in ("experts.channel", "experts.listener"):
            monkeypatch.setattr(f"{module}.Channel", Channel)
        assert_serves(server)
