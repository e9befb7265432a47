"""Router's and actor's end together, and each against a peer that breaks the rules."""

from __future__ import annotations

import logging
import math
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from experts.call import ExpertCall
from experts.channel import Channel, TransportLimits
from experts.errors import (
    BudgetTooSmall,
    ConnectFailed,
    HandshakeRefused,
    LinkLost,
    NotInGroup,
    PeerLost,
    RemoteExpertError,
    UnknownExpert,
)
from experts.frame import (
    HEADER_BYTES,
    Agreement,
    ErrorCode,
    Header,
    Kind,
    decode_header,
    encode_call,
    encode_error,
    encode_header,
    rows_header,
)
from experts.handshake import ROUTER, encode_info, prove
from experts.transport import ExpertConnection, ExpertServer
from tests.experts.wire_peers import (
    AGREED,
    INCARNATION,
    INFO,
    LIMITS,
    MAX_ROWS,
    QUICK,
    SECRET,
    WIDTH,
    FakeActor,
    RawRouter,
    ask,
    assert_serves,
    connecting,
    endpoint_of,
    eventually,
    hear_frame,
    heartbeat,
    make_call,
    nothing_left_behind,
    rows_of,
    serving,
)

SLACK_S = 1.0
"""How late a busy machine may notice that a clock has run out."""


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the data plane logs, as it comes."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, keep = logging.getLogger("experts.transport"), Keep(logging.WARNING)
    logger.addHandler(keep)
    try:
        yield lines  # type: ignore[misc]
    finally:
        logger.removeHandler(keep)


def assert_one_line(lines: list[str], text: str) -> None:
    """Exactly one line is logged, and soon."""
    assert eventually(lambda: len(lines) >= 1)
    time.sleep(0.02)
    assert len(lines) == 1, lines
    assert text in lines[0]


# Calls


@pytest.mark.parametrize("num_rows", [1, 2, 7, MAX_ROWS, MAX_ROWS + 1, 5 * MAX_ROWS, 5 * MAX_ROWS + 3])
def test_call_of_any_size_is_answered_bit_for_bit(num_rows: int) -> None:
    largest = 0

    def compute(call: ExpertCall) -> torch.Tensor:
        nonlocal largest
        call.validate()
        largest = max(largest, call.num_rows)
        return rows_of(call)

    with serving(compute) as server, connecting(server.port) as link:
        for seed in range(3):
            call = make_call(num_rows, seed=seed, component=("model", "talker")[seed % 2], layer=seed)
            assert torch.equal(ask(link, call), rows_of(call))
    assert largest == min(num_rows, MAX_ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 2048])
def test_every_bit_pattern_crosses_unchanged(dtype: torch.dtype, width: int) -> None:
    raw = torch.randint(0, 256, (5 * width * dtype.itemsize,), dtype=torch.uint8)
    tokens_TD = raw.view(dtype).view(5, width)
    info = replace(INFO, dtype=dtype, width=width)
    with (
        serving(lambda call: call.tokens_TD, info=info) as server,
        connecting(server.port) as link,
    ):
        rows_RD = ask(link, ExpertCall("model", 0, (0,), (5,), (0, 1, 2, 3, 4), tokens_TD))
    assert torch.equal(rows_RD.view(torch.uint8), tokens_TD.view(torch.uint8))


@pytest.mark.parametrize(
    "tokens_TD",
    [torch.randn(WIDTH, 4).t(), torch.randn(8, 2 * WIDTH)[::2, ::2], torch.randn(1, WIDTH).expand(4, WIDTH)],
    ids=["transposed", "strided", "expanded"],
)
def test_activations_in_any_layout_are_sent(tokens_TD: torch.Tensor) -> None:
    call = ExpertCall("model", 0, (0, 1), (2, 2), (0, 1, 2, 3), tokens_TD)
    with serving(lambda call: rows_of(call).t().contiguous().t()) as server, connecting(server.port) as link:
        assert torch.equal(ask(link, call), rows_of(call))


def test_one_wide_activations_that_count_as_contiguous_are_sent() -> None:
    tokens_TD = torch.randn(1, 4).t()
    assert tokens_TD.is_contiguous() and tokens_TD.stride() == (1, 4)
    call = ExpertCall("model", 0, (0,), (4,), (0, 1, 2, 3), tokens_TD)
    with serving(info=replace(INFO, width=1)) as server, connecting(server.port) as link:
        assert torch.equal(ask(link, call), rows_of(call))


def test_calls_under_inference_mode_are_answered() -> None:
    with serving() as server, connecting(server.port) as link, torch.inference_mode():
        call = make_call(40)
        assert torch.equal(ask(link, call), rows_of(call))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NotInGroup("model/2/1"), ErrorCode.NOT_IN_GROUP, "model/2/1 does not belong"),
        (BudgetTooSmall(10, 20), ErrorCode.BUDGET_TOO_SMALL, "budget of 10 bytes"),
        (UnknownExpert("model/2/1"), ErrorCode.EXPERT, "no expert model/2/1"),
        (RuntimeError("/a/private/path"), ErrorCode.INTERNAL, "the call failed"),
        (MemoryError(), ErrorCode.INTERNAL, "the call failed"),
    ],
)
def test_error_answer_leaves_the_connection_good(error: Exception, code: ErrorCode, message: str) -> None:
    is_failing = True

    def compute(call: ExpertCall) -> torch.Tensor:
        if is_failing:
            raise error
        return rows_of(call)

    with serving(compute) as server, connecting(server.port) as link:
        for num_rows in (3, 40):
            with pytest.raises(RemoteExpertError, match=message) as answer:
                ask(link, make_call(num_rows))
            assert answer.value.code == code
        assert "private" not in str(answer.value)
        is_failing = False
        assert link.is_open and link.tend()
        assert torch.equal(ask(link, make_call(4)), rows_of(make_call(4)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows: rows[:-1],
        lambda rows: torch.cat((rows, rows)),
        lambda rows: rows[:, :-1],
        lambda rows: rows.half(),
        lambda rows: rows.view(torch.int32),
        lambda rows: rows.flatten(),
        lambda rows: None,
    ],
)
def test_rows_of_another_shape_or_dtype_are_an_internal_error(wrong: Any) -> None:
    """They would be taken for other rows, or for the next frame."""
    with (
        serving(lambda call: wrong(rows_of(call)) if call.layer else rows_of(call)) as server,
        connecting(server.port) as link,
    ):
        with pytest.raises(RemoteExpertError, match="the call failed"):
            ask(link, make_call(3, layer=1))
        assert torch.equal(ask(link, make_call(4, layer=0)), rows_of(make_call(4, layer=0)))


@pytest.mark.parametrize(
    "change",
    [
        {"experts": (), "counts": (), "token_of_R": ()},
        {"experts": (5, 3, 1)},
        {"component": "vision"},
        {"tokens_TD": torch.zeros(9, WIDTH + 1)},
        {"tokens_TD": torch.zeros(9, WIDTH, dtype=torch.float16)},
        {"request_id": "é"},
    ],
)
@pytest.mark.parametrize("num_rows", [6, 40])
def test_call_that_does_not_fit_is_refused_before_anything_is_sent(
    change: dict[str, Any], num_rows: int
) -> None:
    with serving() as server, connecting(server.port) as link:
        with pytest.raises(ValueError):
            link.start(replace(make_call(num_rows), **change), timeout_s=5.0)
        assert torch.equal(ask(link, make_call(4)), rows_of(make_call(4)))


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan])
def test_call_without_time_is_refused(timeout_s: float) -> None:
    with serving() as server, connecting(server.port) as link:
        with pytest.raises(ValueError, match="cannot be answered within"):
            link.start(make_call(), timeout_s=timeout_s)
        assert torch.equal(ask(link, make_call()), rows_of(make_call()))


@pytest.mark.parametrize("timeout_s", [math.inf, 1e7])
def test_call_may_have_all_time(timeout_s: float) -> None:
    with serving() as server, connecting(server.port) as link:
        assert torch.equal(ask(link, make_call(), timeout_s), rows_of(make_call()))


def test_several_connections_get_their_own_rows() -> None:
    failures: list[str] = []

    def route(server: ExpertServer, number: int) -> None:
        with connecting(server.port) as link:
            for seed in range(30):
                call = make_call(1 + (7 * seed + number) % 40, seed=100 * number + seed)
                if not torch.equal(ask(link, call), rows_of(call)):
                    failures.append(f"{number}: {seed}")

    with serving() as server:
        threads = [threading.Thread(target=route, args=(server, number)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
        assert not failures
        assert eventually(lambda: server.num_connections == 0)


def test_threads_that_share_a_connection_take_turns() -> None:
    failures: list[int] = []

    def route(link: ExpertConnection, number: int) -> None:
        for seed in range(20):
            call = make_call(1 + (seed + number) % 20, seed=100 * number + seed)
            if not torch.equal(ask(link, call), rows_of(call)):
                failures.append(number)

    with serving() as server, connecting(server.port) as link:
        threads = [threading.Thread(target=route, args=(link, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
        assert not failures and link.is_open


# Lifetimes


def test_idle_connection_lives_on_heartbeats() -> None:
    with serving(limits=QUICK) as server, connecting(server.port, limits=QUICK) as link:
        for _ in range(20):
            time.sleep(0.04)
            assert link.tend()
        assert torch.equal(ask(link, make_call()), rows_of(make_call()))


def test_long_computation_is_not_taken_for_silence() -> None:
    limits = replace(QUICK, heartbeat_misses=12)  # a busy machine may let a heartbeat wait

    def compute(call: ExpertCall) -> torch.Tensor:
        time.sleep(3 * limits.silence_s)
        return rows_of(call)

    with serving(compute, limits=limits) as server, connecting(server.port, limits=limits) as link:
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
        may_end.wait(10.0)
        return rows_of(call)

    with serving(compute) as server, connecting(server.port) as link:
        link.start(make_call(), timeout_s=20.0)
        assert is_computing.wait(5.0)
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
    import experts.transport

    hear_out = experts.transport.hear_out

    def stop_then(*arguments: Any) -> Any:
        stranger = hear_out(*arguments)
        server.stop()
        return stranger

    with serving() as server:
        monkeypatch.setattr(experts.transport, "hear_out", stop_then)
        with RawRouter(server.port) as router:
            router.introduce()
            assert router.is_closed_within(5.0)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            router = RawRouter(listener.getsockname()[1])
            with router:
                server._admit(listener.accept()[0], "a late peer")
                assert router.is_closed_within(5.0)
    assert server.num_connections == 0


def test_server_that_never_started_can_be_stopped() -> None:
    server = ExpertServer(rows_of, INFO, secret=SECRET, incarnation=1)
    server.stop()
    server.stop()


def test_closing_wakes_a_thread_that_waits_for_rows() -> None:
    may_end = threading.Event()

    def compute(call: ExpertCall) -> torch.Tensor:
        may_end.wait(10.0)
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
        thread.join(5.0)
        assert outcome == ["connection to experts-0 lost: closed here"]


def test_tending_between_start_and_finish_takes_no_answer() -> None:
    with serving() as server, connecting(server.port) as link:
        link.start(make_call(), timeout_s=5.0)
        time.sleep(0.05)
        assert link.tend()
        assert torch.equal(link.finish(), rows_of(make_call()))


# What a server does with peers that break the rules


def _call_frame(call: ExpertCall, sequence: int = 1, **change: int) -> bytes:
    head = encode_call(call, AGREED, sequence, 5_000_000)
    header = decode_header(head[:HEADER_BYTES])._replace(**change)
    return encode_header(header) + head[HEADER_BYTES:] + call.tokens_TD.numpy().tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_refused_with_one_line(seed: int, warnings: list[str]) -> None:
    chance = random.Random(seed)
    noise = chance.randbytes(chance.choice([1, 63, 64, 65, 200, 5000]))
    with serving(limits=QUICK) as server:
        with RawRouter(server.port) as router:
            router.send(chance.choice([b"", b"SAGE", b"SAGE\x01", b"SAGE\x01\x01\x00\x00"]) + noise)
            if seed % 2:
                with suppress(OSError):  # the server may have seen enough
                    router.socket.shutdown(socket.SHUT_WR)
            assert router.is_closed_within(QUICK.handshake_timeout_s + SLACK_S)
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
            assert router.is_closed_within(5.0)
            assert_one_line(warnings, "refused: ")
        assert_serves(server)


def test_repeated_call_is_refused(warnings: list[str]) -> None:
    with serving() as server, RawRouter(server.port) as router:
        router.enter()
        router.ask(make_call(), sequence=1)
        assert router.hear()[0] == rows_header(AGREED, 1, 3)
        router.ask(make_call(), sequence=1)
        assert router.is_closed_within(5.0)
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
            assert router.is_closed_within(5.0)
        assert_one_line(warnings, "wrong proof of the cluster secret")


def test_stranger_that_sends_byte_by_byte_is_given_up(warnings: list[str]) -> None:
    with serving(limits=QUICK) as server, RawRouter(server.port) as router:
        started_s = time.monotonic()
        for byte in encode_header(Header(Kind.HELLO, incarnation=INCARNATION, body_bytes=32)) + bytes(32):
            router.send(bytes([byte]))
            if router.is_closed_within(0.02):
                break
        assert time.monotonic() - started_s < QUICK.handshake_timeout_s + SLACK_S
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
    limits = replace(QUICK, max_unproven=4, handshake_timeout_s=3.0)
    before = threading.active_count()
    with serving(limits=limits) as server:
        flood = [RawRouter(server.port) for _ in range(40)]
        try:
            assert eventually(lambda: threading.active_count() <= before + 2 + 4, 2.0)
            assert len(server._unproven) <= 4
            assert_serves(server)
            assert eventually(lambda: sum(router.is_closed_within(0.001) for router in flood) >= 36, 2.0)
        finally:
            for router in flood:
                router.socket.close()


def test_flood_is_bounded_while_nobody_wakes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger that was shown out but whose thread has not noticed must not save the next from the same."""
    is_done = threading.Event()

    def sleep_on(*_: Any) -> None:
        is_done.wait(10.0)
        raise LinkLost("woke up")

    monkeypatch.setattr("experts.transport.hear_out", sleep_on)
    with serving(limits=replace(QUICK, max_unproven=4)) as server:
        flood = [RawRouter(server.port) for _ in range(12)]
        try:
            assert eventually(lambda: sum(router.is_closed_within(0.001) for router in flood) == 8)
            assert len(server._unproven) == 4
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
    import experts.transport

    welcome = experts.transport.welcome
    all_there = threading.Barrier(2)

    def slowly(*arguments: Any) -> None:
        with pytest.raises(threading.BrokenBarrierError):
            all_there.wait(0.3)  # passes only if a second one gets here
        welcome(*arguments)

    monkeypatch.setattr(experts.transport, "welcome", slowly)
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
    import experts.transport

    welcome = experts.transport.welcome

    def slowly(*arguments: Any) -> None:
        time.sleep(4 * QUICK.heartbeat_interval_s)
        welcome(*arguments)

    monkeypatch.setattr(experts.transport, "welcome", slowly)
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
                assert router.is_closed_within(5.0)
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


# What a router does with actors that break the rules


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
        assert time.monotonic() - started_s < 3 * SLACK_S


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
            ExpertConnection(endpoint_of(listener.getsockname()[1]), secret=SECRET, limits=QUICK)
        assert time.monotonic() - started_s < QUICK.handshake_timeout_s + SLACK_S


def test_address_where_nobody_listens_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectFailed, match=f"127.0.0.1:{port}: Connection refused"):
        ExpertConnection(endpoint_of(port), secret=SECRET)


def test_socket_of_a_peer_that_left_at_once_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(107, "Transport endpoint is not connected")

    with serving() as server:
        monkeypatch.setattr("experts.transport.Channel", refuse)
        with pytest.raises(ConnectFailed, match="not connected"):
            ExpertConnection(endpoint_of(server.port), secret=SECRET)
        with RawRouter(server.port) as router:
            assert router.is_closed_within(5.0)
        monkeypatch.setattr("experts.transport.Channel", Channel)
        assert_serves(server)


# Everything at once


def test_connection_survives_any_mix_of_threads() -> None:
    """Calls, heartbeats and a close race; each call gets its rows or PeerLost, and nothing hangs."""
    failures: list[str] = []

    def route(link: ExpertConnection, number: int) -> None:
        for seed in range(1000):
            call = make_call(1 + seed % 20, seed=seed + number)
            try:
                if not torch.equal(ask(link, call), rows_of(call)):
                    failures.append(f"{number}: wrong rows")
            except PeerLost:
                return

    def tend(link: ExpertConnection) -> None:
        while link.tend():
            time.sleep(0.0005)

    limits = TransportLimits(max_rows_per_frame=MAX_ROWS, heartbeat_interval_s=0.25)
    with serving(limits=limits) as server:
        for _ in range(6):
            with connecting(server.port) as link:
                threads = [threading.Thread(target=route, args=(link, 1000 * n), daemon=True) for n in (0, 1)]
                threads.append(threading.Thread(target=tend, args=(link,), daemon=True))
                for thread in threads:
                    thread.start()
                time.sleep(0.1)
                link.close()
                for thread in threads:
                    thread.join(10.0)
                    assert not thread.is_alive()
                assert not failures
                assert link._channel._is_closed
