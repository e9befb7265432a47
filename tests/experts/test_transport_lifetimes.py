"""Connections of both ends live on heartbeats, end in time, and let go of what they held."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import torch

from experts.call import ExpertCall
from experts.connection import ExpertConnection
from experts.errors import (
    ConnectFailed,
    NotInGroup,
    PeerLost,
)
from experts.frame import (
    Header,
)
from experts.server import ExpertServer
from tests.experts.wire_peers import (
    INFO,
    QUICK,
    SECRET,
    SLACK_S,
    STEADY,
    RawRouter,
    ask,
    assert_one_line,
    assert_serves,
    connecting,
    endpoint_of,
    eventually,
    make_call,
    rows_of,
    serving,
)

pytestmark = pytest.mark.usefixtures("nothing_stays", "each_reader")


def test_idle_connection_lives_on_heartbeats() -> None:
    with serving(limits=STEADY) as server, connecting(server.port, limits=STEADY) as link:
        until_s = time.monotonic() + 1.5 * max(STEADY.silence_s, STEADY.idle_timeout_s)
        while time.monotonic() < until_s:
            time.sleep(0.04)
            assert link.tend()
        assert torch.equal(ask(link, make_call()), rows_of(make_call()))


def test_long_computation_is_not_taken_for_silence() -> None:
    def compute(call: ExpertCall) -> torch.Tensor:
        time.sleep(2 * STEADY.silence_s)
        return rows_of(call)

    with serving(compute, limits=STEADY) as server, connecting(server.port, limits=STEADY) as link:
        assert torch.equal(ask(link, make_call()), rows_of(make_call()))


def test_router_that_is_silent_is_let_go(warnings: list[str]) -> None:
    with serving(limits=QUICK) as server, RawRouter(server.port) as router:
        router.enter()
        assert eventually(lambda: server.num_connections == 1)
        assert router.is_closed_within(QUICK.idle_timeout_s + SLACK_S)
        assert_one_line(warnings, "nothing heard")
        assert eventually(lambda: server.num_connections == 0)


def test_router_that_leaves_in_order_is_not_worth_a_line(warnings: list[str]) -> None:
    with serving() as server:
        with connecting(server.port) as link:
            ask(link, make_call())
        assert eventually(lambda: server.num_connections == 0)
        socket.create_connection(("127.0.0.1", server.port)).close()
        time.sleep(0.02)
    assert warnings == []


def test_late_answer_closes_the_connection(warnings: list[str]) -> None:
    is_slow = threading.Event()
    is_slow.set()

    def compute(call: ExpertCall) -> torch.Tensor:
        if is_slow.is_set():
            time.sleep(0.4)
        return rows_of(call)

    with serving(compute, limits=QUICK) as server, connecting(server.port, limits=QUICK) as link:
        started_s = time.monotonic()
        with pytest.raises(PeerLost, match="the deadline passed"):
            ask(link, make_call(), timeout_s=0.15)
        assert time.monotonic() - started_s < 0.15 + SLACK_S
        assert not link.is_open and not link.tend()
        with pytest.raises(PeerLost):
            link.start(make_call(), timeout_s=1.0)
        is_slow.clear()
        assert_one_line(warnings, "not done by its deadline")
        assert_serves(server)


def test_late_error_closes_the_connection() -> None:
    def compute(call: ExpertCall) -> torch.Tensor:
        time.sleep(0.3)
        raise NotInGroup("model/2/1")

    with serving(compute) as server, RawRouter(server.port) as router:
        router.enter()
        router.ask(make_call(), timeout_s=0.1)
        with pytest.raises(ConnectionError):
            router.hear()


def test_stopped_server_ends_calls_that_run(warnings: list[str]) -> None:
    is_computing, may_end = threading.Event(), threading.Event()

    def compute(call: ExpertCall) -> torch.Tensor:
        is_computing.set()
        may_end.wait(60.0)
        return rows_of(call)

    with serving(compute) as server, connecting(server.port) as link:
        link.start(make_call(), timeout_s=20.0)
        assert is_computing.wait(20.0)
        started_s = time.monotonic()
        server.stop()
        with pytest.raises(PeerLost, match="goodbye"):
            link.finish()
        assert time.monotonic() - started_s < SLACK_S
        may_end.set()
        with pytest.raises(ConnectFailed):
            ExpertConnection(endpoint_of(server.port), secret=SECRET)
        assert eventually(lambda: server.num_connections == 0)
    assert warnings == []


def test_idle_connection_notices_a_stopped_server() -> None:
    with serving() as server, connecting(server.port) as link:
        server.stop()
        assert eventually(lambda: not link.tend())


def test_stopping_ends_a_peer_that_just_came_or_just_proved_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both used to be in no book at some moment; `stop` missed them, and they were served for ever."""
    import experts.listener

    hear_out = experts.listener.hear_out

    def stop_then(*arguments: Any) -> Any:
        stranger = hear_out(*arguments)
        server.stop()
        return stranger

    with serving() as server:
        monkeypatch.setattr(experts.listener, "hear_out", stop_then)
        with RawRouter(server.port) as router:
            router.introduce()
            assert router.is_closed_within(20.0)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            router = RawRouter(listener.getsockname()[1])
            with router:
                server._listener._admit(listener.accept()[0], "a late peer")
                assert router.is_closed_within(20.0)
    assert server.num_connections == 0


def test_server_that_never_started_can_be_stopped() -> None:
    server = ExpertServer(rows_of, INFO, secret=SECRET, incarnation=1)
    server.stop()
    server.stop()


def test_closing_wakes_a_thread_that_waits_for_rows() -> None:
    may_end = threading.Event()

    def compute(call: ExpertCall) -> torch.Tensor:
        may_end.wait(60.0)
        return rows_of(call)

    with serving(compute) as server, connecting(server.port) as link:
        timer = threading.Timer(0.1, link.close)
        timer.start()
        started_s = time.monotonic()
        with pytest.raises(PeerLost, match="closed here"):
            ask(link, make_call())
        assert time.monotonic() - started_s < SLACK_S
        timer.join()
        may_end.set()


def test_socket_is_released_by_whoever_is_last() -> None:
    """`close` may come while another thread holds the connection and is about to let go of it."""
    with serving() as server:
        for _ in range(30):
            with connecting(server.port) as link:
                link.start(make_call(), timeout_s=20.0)
                closer = threading.Thread(target=link.close)
                closer.start()
                with suppress(PeerLost):
                    link.finish()
                closer.join()
                assert link._channel._is_closed


def test_socket_is_released_when_closed_during_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server, connecting(server.port) as link:
        poll_header = link._channel.poll_header

        def close_elsewhere() -> Header | None:
            header = poll_header()
            closer = threading.Thread(target=link.close)
            closer.start()
            closer.join()
            return header

        monkeypatch.setattr(link._channel, "poll_header", close_elsewhere)
        link.tend()
        assert link._channel._is_closed


def test_closing_between_start_and_finish_lets_go_of_the_connection() -> None:
    with serving() as server, connecting(server.port) as link:
        link.start(make_call(), timeout_s=5.0)
        link.close()
        outcome: list[str] = []

        def start_elsewhere() -> None:
            try:
                link.start(make_call(), timeout_s=5.0)
            except PeerLost as loss:
                outcome.append(str(loss))

        thread = threading.Thread(target=start_elsewhere, daemon=True)
        thread.start()
        thread.join(20.0)
        assert outcome == ["connection to experts-0 lost: closed here"]


def test_tending_between_start_and_finish_takes_no_answer() -> None:
    with serving() as server, connecting(server.port) as link:
        link.start(make_call(), timeout_s=5.0)
        time.sleep(0.05)
        assert link.tend()
        assert torch.equal(link.finish(), rows_of(make_call()))
