"""What a server does with peers that break the rules."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from experts.call import ExpertCall
from experts.connection import ExpertConnection
from experts.errors import (
    HandshakeRefused,
    LinkLost,
)
from experts.frame import (
    HEADER_BYTES,
    Agreement,
    Header,
    Kind,
    decode_header,
    encode_call,
    encode_header,
    rows_header,
)
from experts.handshake import ROUTER, prove
from experts.server import ExpertServer
from tests.experts.wire_peers import (
    AGREED,
    INCARNATION,
    INFO,
    LIMITS,
    QUICK,
    SECRET,
    SHY,
    SLACK_S,
    RawRouter,
    ask,
    assert_one_line,
    assert_serves,
    connecting,
    endpoint_of,
    eventually,
    heartbeat,
    make_call,
    rows_of,
    serving,
)

pytestmark = pytest.mark.usefixtures("nothing_stays", "each_reader")


def _call_frame(call: ExpertCall, sequence: int = 1, **change: int) -> bytes:
    head = encode_call(call, AGREED, sequence, 5_000_000)
    header = decode_header(head[:HEADER_BYTES])._replace(**change)
    return encode_header(header) + head[HEADER_BYTES:] + call.tokens_TD.numpy().tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_refused_with_one_line(seed: int, warnings: list[str]) -> None:
    chance = random.Random(seed)
    noise = chance.randbytes(chance.choice([1, 63, 64, 65, 200, 5000]))
    with serving(limits=SHY) as server:
        with RawRouter(server.port) as router:
            router.send(chance.choice([b"", b"SAGE", b"SAGE\x01", b"SAGE\x01\x01\x00\x00"]) + noise)
            if seed % 2:
                with suppress(OSError):  # the server may have seen enough
                    router.socket.shutdown(socket.SHUT_WR)
            assert router.is_closed_within(SHY.handshake_timeout_s + SLACK_S)
        assert_one_line(warnings, "connection from 127.0.0.1")
        assert_serves(server)
        assert len(warnings) == 1


@pytest.mark.parametrize("seed", range(8))
def test_noise_after_the_handshake_is_refused_with_one_line(seed: int, warnings: list[str]) -> None:
    chance = random.Random(seed)
    with serving(limits=QUICK) as server:
        with RawRouter(server.port) as router:
            router.enter()
            if chance.random() < 0.5:
                router.ask(make_call())
                assert router.hear()[0].kind == Kind.ROWS
            frame = bytearray(_call_frame(make_call(), 99))
            for _ in range(chance.randint(1, 20)):
                frame[chance.randrange(len(frame))] = chance.randrange(256)
            router.send(bytes(frame))
            assert router.is_closed_within(QUICK.idle_timeout_s + 5 + SLACK_S)
        assert_one_line(warnings, "connection from 127.0.0.1")
        assert_serves(server)


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 0},
        {"sequence": 2},
        {"sequence": 2**64 - 1},
        {"incarnation": INCARNATION - 1},
        {"incarnation": INCARNATION + 1},
        {"num_rows": 2**32 - 1},
        {"num_tokens": 2**32 - 1},
        {"num_experts": 2**32 - 1},
        {"body_bytes": 2**32 - 1},
        {"body_bytes": 0},
        {"width": 2**32 - 1},
        {"trace_bytes": 255},
        {"component": 2},
        {"dtype_code": 2},
        {"error_code": 1},
        {"deadline_us": 0},
        {"kind": Kind.HELLO},
        {"kind": Kind.ROWS},
        {"kind": Kind.HEARTBEAT},
        {"kind": 0},
        {"kind": 255},
    ],
)
def test_call_with_a_wrong_header_is_refused_before_anything_is_allocated(
    change: dict[str, int], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server, RawRouter(server.port) as router:
        router.enter()
        with monkeypatch.context() as patched:
            patched.delattr(torch, "empty")  # whoever allocates now fails with another line in the log
            router.send(_call_frame(make_call(), **change)[:HEADER_BYTES])
            assert router.is_closed_within(20.0)
            assert_one_line(warnings, "refused: ")
        assert_serves(server)


def test_repeated_call_is_refused(warnings: list[str]) -> None:
    with serving() as server, RawRouter(server.port) as router:
        router.enter()
        router.ask(make_call(), sequence=1)
        assert router.hear()[0] == rows_header(AGREED, 1, 3)
        router.ask(make_call(), sequence=1)
        assert router.is_closed_within(20.0)
        assert_one_line(warnings, "sequence is 1 instead of 2")


def test_wrong_secret_is_refused(warnings: list[str]) -> None:
    with serving() as server:
        with pytest.raises(HandshakeRefused, match="is it the same secret"):
            ExpertConnection(endpoint_of(server.port), secret=b"another secret of some length")
        assert_one_line(warnings, "wrong proof of the cluster secret")
        assert_serves(server)


def test_stranger_is_told_neither_secret_nor_service() -> None:
    with serving() as server, RawRouter(server.port) as router:
        router.introduce(secret=b"another secret of some length")
        with pytest.raises(ConnectionError):
            router.hear()


@pytest.mark.parametrize("incarnation", [INCARNATION - 1, INCARNATION + 1, 0, 2**64 - 1])
def test_wrong_incarnation_is_refused(incarnation: int, warnings: list[str]) -> None:
    with serving() as server:
        with pytest.raises(HandshakeRefused, match=f"another incarnation than {incarnation}"):
            ExpertConnection(endpoint_of(server.port, incarnation=incarnation), secret=SECRET)
        assert_one_line(warnings, "refused: wrong incarnation")
        assert_serves(server)


def test_replayed_proof_is_refused(warnings: list[str]) -> None:
    """Somebody who listened to a whole handshake says the same again."""
    nonce = bytes(range(32))
    hello = encode_header(Header(Kind.HELLO, incarnation=INCARNATION, body_bytes=32)) + nonce
    with serving() as server:
        with RawRouter(server.port) as router:
            router.send(hello)
            proof = prove(SECRET, ROUTER, INCARNATION, nonce + router.hear()[1])
            spoken = encode_header(Header(Kind.PROOF, incarnation=INCARNATION, body_bytes=32)) + proof
            router.send(spoken)
            assert router.hear()[0].kind == Kind.WELCOME
        with RawRouter(server.port) as router:
            router.send(hello + spoken)
            assert router.hear()[0].kind == Kind.CHALLENGE
            assert router.is_closed_within(20.0)
        assert_one_line(warnings, "wrong proof of the cluster secret")


def test_stranger_that_sends_byte_by_byte_is_given_up(warnings: list[str]) -> None:
    with serving(limits=SHY) as server, RawRouter(server.port) as router:
        started_s = time.monotonic()
        for byte in encode_header(Header(Kind.HELLO, incarnation=INCARNATION, body_bytes=32)) + bytes(32):
            router.send(bytes([byte]))
            if router.is_closed_within(0.02):
                break
        assert time.monotonic() - started_s < SHY.handshake_timeout_s + SLACK_S
        assert_one_line(warnings, "the deadline passed")
        assert_serves(server)


def test_call_that_comes_byte_by_byte_is_given_up_at_its_deadline(warnings: list[str]) -> None:
    with serving(limits=QUICK) as server, RawRouter(server.port) as router:
        router.enter()
        frame = _call_frame(make_call(), deadline_us=200_000)
        router.send(frame[:HEADER_BYTES])
        started_s = time.monotonic()
        for byte in frame[HEADER_BYTES:]:
            router.send(bytes([byte]))
            if router.is_closed_within(0.01):
                break
        assert time.monotonic() - started_s < 0.2 + SLACK_S
        assert_one_line(warnings, "the deadline passed")
        assert_serves(server)


def test_call_cut_in_two_is_given_up_after_the_silence(warnings: list[str]) -> None:
    with serving(limits=QUICK) as server, RawRouter(server.port) as router:
        router.enter()
        router.send(_call_frame(make_call())[:-1])
        assert router.is_closed_within(QUICK.silence_s + SLACK_S)
        assert_one_line(warnings, "nothing heard")


def test_call_that_comes_in_pieces_is_answered() -> None:
    with serving() as server, RawRouter(server.port) as router:
        router.enter()
        call = make_call(6)
        frame = heartbeat() + _call_frame(call) + heartbeat()
        for start in range(0, len(frame), 7):
            router.send(frame[start : start + 7])
            time.sleep(0.0005)
        header, body = router.hear()
        assert header == rows_header(AGREED, 1, 6)
        assert body == rows_of(call).numpy().tobytes()


def test_router_that_stops_reading_is_let_go(warnings: list[str]) -> None:
    limits = replace(QUICK, max_rows_per_frame=4096, max_connections=2)
    info = replace(INFO, width=4096)
    call = ExpertCall("model", 0, (1,), (4096,), (0,) * 4096, torch.zeros(1, 4096))
    with (
        serving(lambda call: torch.zeros(4096, 4096), limits=limits, info=info) as server,
        RawRouter(server.port) as router,
    ):
        router.enter()
        agreed = Agreement(INCARNATION, 4096, torch.float32, info.components, 4096)
        router.send(encode_call(call, agreed, 1, 20_000_000) + call.tokens_TD.numpy().tobytes())
        assert_one_line(warnings, "does not read what is sent")
        assert eventually(lambda: server.num_connections == 0)


def test_flood_of_strangers_is_bounded_and_does_not_shut_others_out() -> None:
    limits = replace(QUICK, max_unproven=4, handshake_timeout_s=60.0)
    before = threading.active_count()
    with serving(limits=limits) as server:
        flood = [RawRouter(server.port) for _ in range(40)]
        try:
            assert eventually(lambda: threading.active_count() <= before + 2 + 4)
            assert len(server._listener._unproven) <= 4
            assert_serves(server)
            assert eventually(lambda: sum(router.is_closed_within(0.001) for router in flood) >= 36)
        finally:
            for router in flood:
                router.socket.close()


def test_flood_is_bounded_while_nobody_wakes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger that was shown out but whose thread has not noticed must not save the next from the same."""
    is_done = threading.Event()

    def sleep_on(*_: Any) -> None:
        is_done.wait(60.0)
        raise LinkLost("woke up")

    monkeypatch.setattr("experts.listener.hear_out", sleep_on)
    with serving(limits=replace(QUICK, max_unproven=4)) as server:
        flood = [RawRouter(server.port) for _ in range(12)]
        try:
            assert eventually(lambda: sum(router.is_closed_within(0.001) for router in flood) == 8)
            assert len(server._listener._unproven) == 4
        finally:
            is_done.set()
            for router in flood:
                router.socket.close()


def test_one_router_too_many_is_told_that_the_server_is_busy(warnings: list[str]) -> None:
    with serving(limits=replace(LIMITS, max_connections=2)) as server:
        with connecting(server.port) as first, connecting(server.port) as second:
            with pytest.raises(HandshakeRefused, match="as many connections as it takes"):
                ExpertConnection(endpoint_of(server.port), secret=SECRET)
            assert_one_line(warnings, "refused: busy")
            for link in (first, second):
                assert torch.equal(ask(link, make_call()), rows_of(make_call()))
        assert eventually(lambda: server.num_connections == 0)
        assert_serves(server)


def test_routers_that_come_at_once_do_not_exceed_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    import experts.listener

    welcome = experts.listener.welcome
    all_there = threading.Barrier(2)

    def slowly(*arguments: Any) -> None:
        with pytest.raises(threading.BrokenBarrierError):
            all_there.wait(0.3)  # passes only if a second one gets here
        welcome(*arguments)

    monkeypatch.setattr(experts.listener, "welcome", slowly)
    with (
        serving(limits=replace(LIMITS, max_connections=1)) as server,
        RawRouter(server.port) as first,
        RawRouter(server.port) as second,
    ):
        first.introduce()
        second.introduce()
        kinds = sorted((first.hear()[0].kind, second.hear()[0].kind))
        assert kinds == [Kind.WELCOME, Kind.ERROR]


def test_no_heartbeat_comes_before_the_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    import experts.listener

    welcome = experts.listener.welcome

    def slowly(*arguments: Any) -> None:
        time.sleep(4 * QUICK.heartbeat_interval_s)
        welcome(*arguments)

    monkeypatch.setattr(experts.listener, "welcome", slowly)
    with serving(limits=QUICK) as server, connecting(server.port) as link:
        assert torch.equal(ask(link, make_call()), rows_of(make_call()))


def test_server_outlives_a_lack_of_threads(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    with serving() as server:
        with monkeypatch.context() as patched:
            start = threading.Thread.start

            def refuse(thread: threading.Thread) -> None:
                if thread.name.startswith("expert-peer"):
                    raise RuntimeError("can't start new thread")
                start(thread)

            patched.setattr(threading.Thread, "start", refuse)
            with RawRouter(server.port) as router:
                assert router.is_closed_within(20.0)
            assert_one_line(warnings, "can't start new thread")
        assert_serves(server)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"components": tuple(f"component-{i}" for i in range(400))}, "at most 4096"),
        ({"dtype": torch.int64}, "int64"),
        ({"width": 2**30}, "too many for one frame"),
    ],
)
def test_service_that_cannot_be_announced_is_refused_at_the_start(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertServer(rows_of, replace(INFO, **change), secret=SECRET, incarnation=1)


def test_short_secret_is_refused_by_both_ends() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        ExpertServer(rows_of, INFO, secret=b"short", incarnation=1)
    with pytest.raises(ValueError, match="at least 16"):
        ExpertConnection(endpoint_of(1), secret=b"short")
