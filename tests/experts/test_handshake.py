"""The handshake: who does not know the secret, or means another life of the actor, gets nowhere."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.channel import Channel, TransportLimits
from experts.errors import FrameFault, LinkLost
from experts.frame import DTYPE_CODES, Agreement, ErrorCode, Header, Kind, encode_header
from experts.handshake import (
    ACTOR,
    MAX_INFO_BYTES,
    ROUTER,
    ServiceInfo,
    Stranger,
    check_secret,
    encode_info,
    hear_out,
    introduce,
    prove,
    refuse,
    welcome,
)
from tests.experts.wire_peers import (
    INCARNATION,
    INFO,
    LIMITS,
    MAX_ROWS,
    SECRET,
    SLACK_S,
    channel_pair,
    hear_frame,
    raw_pair,
)

ANNOUNCED = encode_info(INFO, MAX_ROWS)
FACTS = json.loads(ANNOUNCED)


def _meet(
    actor: Callable[[Channel, float], None],
    *,
    secret: bytes = SECRET,
    incarnation: int = INCARNATION,
    limits: TransportLimits = LIMITS,
) -> tuple[ServiceInfo, Agreement]:
    """Introduce a router to an actor that runs on another thread."""
    deadline_s = time.monotonic() + 20.0
    with channel_pair(limits) as (near, far):

        def act() -> None:
            try:
                actor(far, deadline_s)
            except (LinkLost, FrameFault) as error:
                far.end(str(error))

        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        try:
            return introduce(near, secret, incarnation, limits, deadline_s)
        finally:
            near.end("done")
            thread.join(5.0)


def _welcoming(
    announced: bytes = ANNOUNCED, secret: bytes = SECRET, said: Callable[[Stranger], Stranger] = lambda s: s
) -> Callable[[Channel, float], None]:
    """An actor that lets everybody in who knows the right secret."""

    def act(channel: Channel, deadline_s: float) -> None:
        stranger = hear_out(channel, SECRET, deadline_s)
        welcome(channel, secret, said(stranger), announced, deadline_s)

    return act


def test_both_who_know_the_secret_agree() -> None:
    info, agreed = _meet(_welcoming())
    assert info == INFO
    assert agreed == Agreement(INCARNATION, INFO.width, INFO.dtype, INFO.components, MAX_ROWS)


@pytest.mark.parametrize(("announced", "own"), [(16, 4), (4, 16)])
def test_the_smaller_frame_is_agreed(announced: int, own: int) -> None:
    limits = TransportLimits(max_rows_per_frame=own)
    _, agreed = _meet(_welcoming(encode_info(INFO, announced)), limits=limits)
    assert agreed.max_rows == 4


def test_router_with_another_secret_is_told_nothing() -> None:
    heard: list[str] = []

    def act(channel: Channel, deadline_s: float) -> None:
        with pytest.raises(FrameFault, match="wrong proof") as fault:
            hear_out(channel, SECRET, deadline_s)
        heard.append(str(fault.value))
        channel.end("refused")

    with pytest.raises(LinkLost, match="closed by the peer after our proof"):
        _meet(act, secret=b"another secret of some length")
    assert heard


def test_actor_with_another_secret_is_refused() -> None:
    with pytest.raises(FrameFault, match="the actor does not know the secret"):
        _meet(_welcoming(secret=b"another secret of some length"))


def test_actor_that_proves_for_other_nonces_is_refused() -> None:
    with pytest.raises(FrameFault, match="the actor does not know the secret"):
        _meet(_welcoming(said=lambda stranger: replace(stranger, nonces=stranger.nonces[::-1])))


def test_announcement_altered_on_its_way_is_refused() -> None:
    def act(channel: Channel, deadline_s: float) -> None:
        stranger = hear_out(channel, SECRET, deadline_s)
        proof = prove(SECRET, ACTOR, INCARNATION, stranger.nonces, ANNOUNCED)
        body = proof + ANNOUNCED.replace(b'"width": 8', b'"width": 9')
        header = Header(Kind.WELCOME, incarnation=INCARNATION, body_bytes=len(body))
        channel.send(encode_header(header) + body, deadline_s=deadline_s)

    with pytest.raises(FrameFault, match="the actor does not know the secret"):
        _meet(act)


def test_frames_sent_back_to_their_sender_are_refused() -> None:
    with raw_pair() as (channel, far):

        def echo() -> None:
            while data := far.recv(4096):
                far.sendall(data)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        with pytest.raises(FrameFault, match="kind is 1 instead of 2"):
            introduce(channel, SECRET, INCARNATION, LIMITS, time.monotonic() + 20.0)
        channel.end("done")
        thread.join(5.0)


def test_proof_holds_for_one_role_incarnation_pair_of_nonces_and_announcement() -> None:
    proofs = [
        prove(SECRET, ROUTER, 1, b"n" * 64),
        prove(SECRET, ACTOR, 1, b"n" * 64),
        prove(SECRET, ROUTER, 2, b"n" * 64),
        prove(SECRET, ROUTER, 1, b"m" * 64),
        prove(SECRET, ROUTER, 1, b"n" * 64, b"info"),
        prove(SECRET + b"x", ROUTER, 1, b"n" * 64),
    ]
    assert len(set(proofs)) == len(proofs)


def test_proof_is_computed_as_documented() -> None:
    """The example of docs/wire-format.md."""
    proof = prove(b"0123456789abcdef", b"router", 7, bytes(range(64)))
    assert proof.hex() == "5aacbc07cc833b46fa731915ee26f26a83cb888df1928bbcbf83a9c23b91bd07"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (ErrorCode.WRONG_INCARNATION, "the actor there is another incarnation than 7"),
        (ErrorCode.BUSY, "as many connections as it takes"),
        (ErrorCode.INTERNAL, "welcome of 0 bytes"),
    ],
)
def test_refused_router_says_why(code: ErrorCode, message: str) -> None:
    def act(channel: Channel, deadline_s: float) -> None:
        hear_out(channel, SECRET, deadline_s)
        refuse(channel, code, deadline_s)

    with pytest.raises(FrameFault, match=message):
        _meet(act)


@pytest.mark.parametrize(
    "announced",
    [
        b"",
        b"no json",
        b"[]",
        b"null",
        b"\xff\xfe{",
        b"[" * MAX_INFO_BYTES,
        json.dumps({"width": 8}).encode(),
        *(
            json.dumps(FACTS | change).encode()
            for change in (
                {"width": 0},
                {"width": -1},
                {"width": 10**9},
                {"width": "8"},
                {"width": True},
                {"width": 8.0},
                {"dtype": "int64"},
                {"dtype": ["float32"]},
                {"numerics_class": 3},
                {"components": []},
                {"components": {}},
                {"components": "model"},
                {"components": ["model", 3]},
                {"components": None},
                {"max_rows": 0},
                {"max_rows": 2**40},
                {"max_rows": None},
            )
        ),
    ],
)
def test_unusable_announcement_is_refused(announced: bytes) -> None:
    with pytest.raises(FrameFault, match="welcome"):
        _meet(_welcoming(announced))


def test_announcement_of_rows_that_no_frame_can_hold_is_refused() -> None:
    limits = TransportLimits(max_rows_per_frame=2**20)
    announced = encode_info(replace(INFO, width=65536), 2**20)
    with pytest.raises(FrameFault, match="what a frame cannot hold"):
        _meet(_welcoming(announced), limits=limits)


@given(
    st.integers(1, 65536),
    st.sampled_from(sorted(DTYPE_CODES, key=str)),
    st.text(max_size=40),
    st.lists(st.text(max_size=20), min_size=1, max_size=5),
)
@settings(max_examples=20, deadline=None)
def test_any_announcement_is_understood(
    width: int, dtype: torch.dtype, numerics_class: str, components: list[str]
) -> None:
    info = ServiceInfo(width, dtype, numerics_class, tuple(components))
    assert _meet(_welcoming(encode_info(info, MAX_ROWS)))[0] == info


def test_announcement_that_is_too_long_is_not_made() -> None:
    with pytest.raises(ValueError, match="at most 4096"):
        encode_info(replace(INFO, components=tuple(f"component-{i}" for i in range(400))), 16)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": Kind.CALL},
        {"kind": Kind.PROOF},
        {"body_bytes": 0},
        {"body_bytes": 33},
        {"body_bytes": 2**32 - 1},
        {"sequence": 1},
        {"layer": 1},
        {"error_code": 1},
        {"width": 1},
        {"deadline_us": 1},
    ],
)
def test_hello_that_is_none_is_refused_before_its_body(change: dict[str, Any]) -> None:
    header = Header(Kind.HELLO, incarnation=INCARNATION, body_bytes=32)._replace(**change)
    with raw_pair() as (channel, far):
        far.sendall(encode_header(header))
        with pytest.raises(FrameFault):
            hear_out(channel, SECRET, time.monotonic() + 20.0)


def test_proof_for_another_incarnation_than_the_hello_is_refused() -> None:
    with raw_pair() as (channel, far):
        far.sendall(encode_header(Header(Kind.HELLO, incarnation=1, body_bytes=32)) + bytes(32))
        far.sendall(encode_header(Header(Kind.PROOF, incarnation=2, body_bytes=32)) + bytes(32))
        with pytest.raises(FrameFault, match="incarnation is 2 instead of 1"):
            hear_out(channel, SECRET, time.monotonic() + 20.0)


def test_router_that_sends_byte_by_byte_is_given_up_at_the_deadline() -> None:
    with raw_pair() as (channel, far):
        is_done = threading.Event()

        def trickle() -> None:
            for byte in encode_header(Header(Kind.HELLO, body_bytes=32)):
                far.sendall(bytes([byte]))
                if is_done.wait(0.02):
                    return

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        started_s = time.monotonic()
        with pytest.raises(LinkLost, match="the deadline passed"):
            hear_out(channel, SECRET, started_s + 0.3)
        assert time.monotonic() - started_s < 0.3 + SLACK_S
        is_done.set()
        thread.join(5.0)


def test_challenges_never_repeat() -> None:
    challenges = set()
    for _ in range(20):
        with raw_pair() as (channel, far):
            far.sendall(encode_header(Header(Kind.HELLO, body_bytes=32)) + bytes(32))
            far.sendall(encode_header(Header(Kind.PROOF, body_bytes=32)) + bytes(32))
            with pytest.raises(FrameFault, match="wrong proof"):
                hear_out(channel, SECRET, time.monotonic() + 20.0)
            challenges.add(hear_frame(far)[1])
    assert len(challenges) == 20


def test_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        check_secret(b"0123456789abcde")
    check_secret(b"0123456789abcdef")
