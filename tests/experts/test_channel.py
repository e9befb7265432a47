"""A socket that carries frames: whole, in order, and never longer waited for than was asked."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.channel import Channel, TransportLimits
from experts.errors import FrameFault, LinkLost
from experts.frame import HEADER_BYTES, Header, Kind, decode_header, encode_header
from tests.experts.conftest import NEEDS_PLANE
from tests.experts.wire_peers import LIMITS, QUICK, SLACK_S, channel_pair, eventually, heartbeat, raw_pair

SOON_S = 20.0


@pytest.fixture(
    scope="module", autouse=True, params=[False, pytest.param(True, marks=NEEDS_PLANE)], ids=["python", "c"]
)
def looks_first(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Waits by Python, and then by the C source, which alone looks for bytes before it sleeps."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            patch.setattr("experts.channel.plane", lambda: None)
            patch.setattr("experts.native_plane.plane", lambda: None)
        yield request.param


def _soon() -> float:
    return time.monotonic() + SOON_S


def _read_all(connected: socket.socket) -> bytes:
    data = b""
    while piece := connected.recv(1 << 16):
        data += piece
    return data


@pytest.mark.parametrize(
    "change",
    [
        {"max_rows_per_frame": 0},
        {"heartbeat_interval_s": -1.0},
        {"heartbeat_interval_s": 1e-6},
        {"connect_timeout_s": math.inf},
        {"idle_timeout_s": math.nan},
    ],
)
def test_limit_that_limits_nothing_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        TransportLimits(**change)  # type: ignore[arg-type]


@given(
    st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    st.lists(st.integers(1, 200), min_size=1, max_size=8),
)
@settings(max_examples=25, deadline=None)
def test_frames_cut_anywhere_arrive_whole(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(
        encode_header(Header(Kind.CALL, sequence=number, body_bytes=len(body))) + body
        for number, body in enumerate(bodies)
    )
    with raw_pair() as (channel, far):

        def feed() -> None:
            start = 0
            for cut in cuts:
                far.sendall(stream[start : start + cut])
                start += cut
                time.sleep(0.0005)
            far.sendall(stream[start:])

        thread = threading.Thread(target=feed, daemon=True)
        thread.start()
        for number, body in enumerate(bodies):
            header = channel.receive_header(_soon(), SOON_S)
            assert header.sequence == number
            room = bytearray(header.body_bytes)
            half = len(room) // 2
            view = memoryview(room)
            channel.receive_body(view[:half], view[half:], deadline_s=_soon(), silence_s=SOON_S)
            assert room == body
        thread.join(5.0)


def test_silent_peer_is_noticed() -> None:
    with raw_pair() as (channel, _):
        started_s = time.monotonic()
        with pytest.raises(LinkLost, match="nothing heard"):
            channel.receive_header(math.inf, 0.2)
        assert 0.2 <= time.monotonic() - started_s < 0.2 + SLACK_S


def test_silence_of_the_past_does_not_count() -> None:
    with raw_pair() as (channel, far):
        channel.state.heard_at_ns -= 100_000_000_000
        timer = threading.Timer(0.1, far.sendall, [heartbeat()])
        timer.start()
        assert channel.receive_header(math.inf, SOON_S).kind == Kind.HEARTBEAT
        timer.join()


@pytest.mark.parametrize("num_bytes", [0, 10, HEADER_BYTES, HEADER_BYTES + 10])
def test_late_frame_is_given_up_at_the_deadline(num_bytes: int) -> None:
    frame = encode_header(Header(Kind.CALL, body_bytes=20)) + bytes(20)
    with raw_pair() as (channel, far):
        far.sendall(frame[:num_bytes])
        started_s = time.monotonic()
        with pytest.raises(LinkLost, match="the deadline passed"):
            channel.receive_header(started_s + 0.2, math.inf)
            channel.receive_body(memoryview(bytearray(20)), deadline_s=started_s + 0.2, silence_s=math.inf)
        assert 0.2 <= time.monotonic() - started_s < 0.2 + SLACK_S


def test_body_that_comes_byte_by_byte_is_given_up_at_the_deadline() -> None:
    with raw_pair() as (channel, far):
        is_done = threading.Event()

        def trickle() -> None:
            while not is_done.wait(0.01):
                far.sendall(b"x")

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        started_s = time.monotonic()
        with pytest.raises(LinkLost, match="the deadline passed"):
            channel.receive_body(memoryview(bytearray(10_000)), deadline_s=started_s + 0.3, silence_s=0.2)
        assert time.monotonic() - started_s < 0.3 + SLACK_S
        is_done.set()
        thread.join(5.0)


@pytest.mark.parametrize(
    ("num_bytes", "is_orderly"), [(0, True), (1, False), (HEADER_BYTES, False), (HEADER_BYTES + 1, False)]
)
def test_end_of_stream_is_orderly_only_between_frames(num_bytes: int, is_orderly: bool) -> None:
    frame = encode_header(Header(Kind.CALL, body_bytes=20)) + bytes(20)
    with raw_pair() as (channel, far):
        far.sendall(frame[:num_bytes])
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkLost, match="closed by the peer") as loss:
            channel.receive_header(_soon(), SOON_S)
            channel.receive_body(memoryview(bytearray(20)), deadline_s=_soon(), silence_s=SOON_S)
        assert loss.value.is_orderly == is_orderly


def test_polling_takes_only_what_is_there() -> None:
    with raw_pair() as (channel, far):
        assert channel.poll_header() is None
        frame = heartbeat()
        far.sendall(frame[:30])
        assert eventually(lambda: channel.poll_header() is None and channel.state.filled == 30)
        far.sendall(frame[30:] + frame)
        assert eventually(lambda: channel.poll_header() is not None)
        assert channel.receive_header(_soon(), SOON_S) == decode_header(frame)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkLost) as loss:
            eventually(lambda: channel.poll_header() is not None)
        assert loss.value.is_orderly


def test_header_begun_by_polling_is_ended_by_waiting() -> None:
    with raw_pair() as (channel, far):
        frame = heartbeat()
        far.sendall(frame[:30])
        assert eventually(lambda: channel.poll_header() is None and channel.state.filled == 30)
        far.sendall(frame[30:])
        assert channel.receive_header(_soon(), SOON_S) == decode_header(frame)


@pytest.mark.parametrize(
    "read", [Channel.poll_header, lambda channel: channel.receive_header(_soon(), SOON_S)]
)
def test_noise_is_refused(read: Callable[[Channel], object]) -> None:
    with raw_pair() as (channel, far):
        far.sendall(b"GET / HTTP/1.1\r\n" * 10)
        with pytest.raises(FrameFault, match="not a frame"):
            eventually(lambda: read(channel) is not None)


def test_peer_that_does_not_read_is_given_up_after_the_silence() -> None:
    with raw_pair() as (channel, _):
        started_s = time.monotonic()
        with pytest.raises(LinkLost, match="does not read"):
            channel.send(bytes(64), memoryview(bytes(64 << 20)), deadline_s=math.inf)
        assert time.monotonic() - started_s < QUICK.silence_s + QUICK.heartbeat_interval_s + SLACK_S


def test_nothing_follows_a_frame_that_was_cut() -> None:
    """A heartbeat there would be taken for the rest of the frame."""
    with raw_pair() as (channel, far):
        with pytest.raises(LinkLost, match="does not read"):
            channel.send(b"x" * (64 << 20), deadline_s=time.monotonic() + 0.1)
        reader = threading.Thread(target=lambda: received.append(_read_all(far)), daemon=True)
        received: list[bytes] = []
        reader.start()
        while reader.is_alive():
            channel.send_short(heartbeat())
            reader.join(0.001)
        assert received[0].strip(b"x") == b""


def test_slow_reader_gets_everything() -> None:
    body = bytes(range(256)) * (1 << 15)
    with raw_pair(LIMITS) as (channel, far):
        thread = threading.Thread(
            target=lambda: channel.send(body[:100], memoryview(body)[100:], deadline_s=_soon())
        )
        thread.start()
        received = bytearray()
        while len(received) < len(body):
            received += far.recv(1 << 18)
            time.sleep(0.001)
        thread.join(5.0)
        assert received == body


def test_heartbeat_does_not_wait_for_a_full_pipe() -> None:
    with raw_pair() as (channel, far):
        far.settimeout(2.0)
        channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        started_s = time.monotonic()
        for _ in range(50_000):
            channel.send_short(heartbeat())
        assert time.monotonic() - started_s < SOON_S
        channel.end("done")
        assert len(_read_all(far)) < 50_000 * HEADER_BYTES


def test_heartbeat_never_splits_a_frame() -> None:
    frames = [
        encode_header(Header(Kind.CALL, sequence=number, body_bytes=200_000)) + bytes(200_000)
        for number in range(20)
    ]
    with channel_pair(TransportLimits()) as (near, far):
        is_done = threading.Event()

        def beat() -> None:
            while not is_done.is_set():
                near.send_short(heartbeat())
                time.sleep(0)

        def feed() -> None:
            for frame in frames:
                near.send(frame, deadline_s=_soon())

        threads = [threading.Thread(target=beat, daemon=True), threading.Thread(target=feed, daemon=True)]
        for thread in threads:
            thread.start()
        room = memoryview(bytearray(200_000))
        for number in range(20):
            while (header := far.receive_header(_soon(), SOON_S)).kind == Kind.HEARTBEAT:
                pass
            assert (header.kind, header.sequence) == (Kind.CALL, number)
            far.receive_body(room, deadline_s=_soon(), silence_s=SOON_S)
        is_done.set()
        for thread in threads:
            thread.join(5.0)


def test_ending_wakes_the_thread_that_waits() -> None:
    with raw_pair() as (channel, _):
        timer = threading.Timer(0.1, channel.end, ["enough"])
        timer.start()
        started_s = time.monotonic()
        with pytest.raises(LinkLost, match="enough"):
            channel.receive_header(math.inf, math.inf)
        assert time.monotonic() - started_s < SLACK_S
        timer.join()


def test_first_reason_of_an_end_is_kept() -> None:
    with raw_pair() as (channel, _):
        channel.end("first")
        channel.end("second")
        channel.close()
        with pytest.raises(LinkLost, match="first"):
            channel.receive_header(_soon(), SOON_S)
        with pytest.raises(LinkLost, match="first"):
            channel.send(b"x", deadline_s=_soon())


def test_closing_twice_and_using_after_is_safe() -> None:
    with raw_pair() as (channel, far):
        channel.close()
        channel.close()
        channel.end("late")
        channel.send_short(heartbeat())
        for read in (channel.poll_header, lambda: channel.receive_header(_soon(), SOON_S)):
            with pytest.raises(LinkLost, match="closed here"):
                read()
        assert _read_all(far) == b""


@pytest.mark.parametrize("spin_s", [0.0, 0.05])
def test_spinning_reader_gets_what_a_sleeping_one_gets(spin_s: float) -> None:
    body = bytes(range(256)) * 1024
    frame = encode_header(Header(Kind.CALL, sequence=1, body_bytes=len(body))) + body
    with raw_pair(replace(QUICK, spin_s=spin_s)) as (channel, far):
        sender = threading.Thread(target=_send_in_pieces, args=(far, frame))
        sender.start()
        header = channel.receive_header(_soon(), SOON_S)
        received = memoryview(bytearray(header.body_bytes))
        channel.receive_body(received, deadline_s=_soon(), silence_s=SOON_S)
        sender.join()
        assert received == body
        far.close()
        with pytest.raises(LinkLost, match="closed by the peer"):
            channel.receive_header(_soon(), SOON_S)


def test_reader_that_looks_in_vain_sleeps_for_longer_each_time_until_looking_brings_something(
    looks_first: bool,
) -> None:
    if not looks_first:
        pytest.skip("nobody looks")
    frame = encode_header(Header(Kind.HEARTBEAT))
    with raw_pair(replace(QUICK, spin_s=0.002)) as (channel, far):
        far.sendall(frame)
        channel.receive_header(_soon(), SOON_S)
        for waits in (1, 3, 7):
            with pytest.raises(LinkLost, match="deadline"):
                channel.receive_header(time.monotonic() + 0.01, math.inf)
            assert channel.state.waits_to_sleep == waits, "it looked, and then slept"
            for left in reversed(range(waits)):
                far.sendall(frame)
                channel.receive_header(_soon(), SOON_S)
                assert channel.state.waits_to_sleep == left
        far.sendall(frame)
        channel.receive_header(_soon(), SOON_S)
        assert (channel.state.num_fruitless, channel.state.waits_to_sleep) == (0, 0)


def test_waits_in_which_nobody_asks_do_not_count_as_looking_in_vain(
    looks_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first answer after a lull would pay for it."""
    if not looks_first:
        pytest.skip("nobody looks")
    monkeypatch.setattr("experts.channel.LOST_CORE_S", 9.0)
    with raw_pair(replace(QUICK, spin_s=0.002)) as (channel, _):
        for _ in range(5):
            with pytest.raises(LinkLost, match="deadline"):
                channel.receive_header(time.monotonic() + 0.01, math.inf)
        assert (channel.state.num_fruitless, channel.state.waits_to_sleep) == (0, 0)


def _send_in_pieces(far: socket.socket, frame: bytes) -> None:
    for first in range(0, len(frame), 100_000):
        time.sleep(0.01)
        far.sendall(frame[first : first + 100_000])
