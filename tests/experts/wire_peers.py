"""Both ends of the data plane for tests: servers over a stand-in for experts, and peers that speak byte by byte.

`RawRouter` and `FakeActor` know the wire format only through `experts.frame` and `experts.handshake.prove`, and so
can say what the real ends never would.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from experts.call import ExpertCall
from experts.channel import Channel, TransportLimits
from experts.connection import ExpertConnection
from experts.desk import Desk
from experts.frame import HEADER_BYTES, Agreement, Header, Kind, decode_header, encode_call, encode_header
from experts.handshake import ACTOR, ROUTER, ServiceInfo, encode_info, prove
from experts.native_plane import plane
from experts.roster import Endpoint
from experts.server import Compute, ExpertServer
from extraction.manifest import ExpertKey

SECRET = b"0123456789abcdef-the-cluster"
SLACK_S = 8.0
"""How late a busy machine may notice that a clock has run out."""
WIDTH, INCARNATION, MAX_ROWS = 8, 7, 16
INFO = ServiceInfo(WIDTH, torch.float32, "a/class", ("model", "talker"))
AGREED = Agreement(INCARNATION, WIDTH, torch.float32, INFO.components, MAX_ROWS)
LIMITS = TransportLimits(max_rows_per_frame=MAX_ROWS)
QUICK = TransportLimits(
    max_rows_per_frame=MAX_ROWS, heartbeat_interval_s=0.05, handshake_timeout_s=5.0, idle_timeout_s=0.4
)
"""For tests that wait for a clock to run out; the others keep the defaults, which a busy machine does not reach."""
STEADY = replace(QUICK, heartbeat_misses=24, idle_timeout_s=1.2)
"""For tests in which a clock must not run out, though there is time for it."""
SHY = replace(QUICK, handshake_timeout_s=0.5)
"""For tests that wait for a handshake to be given up."""


def make_call(num_rows: int = 3, *, seed: int = 0, component: str = "model", layer: int = 2) -> ExpertCall:
    """A call of `num_rows` rows over a few experts and tokens, its activations random."""
    chance = torch.Generator().manual_seed(seed)
    num_tokens = max(1, num_rows // 2)
    num_experts = min(num_rows, 3)
    counts = [num_rows // num_experts] * num_experts
    counts[0] += num_rows - sum(counts)
    tokens = torch.randint(0, num_tokens, (num_rows,), generator=chance).tolist()
    tokens_TD = torch.randn(num_tokens, WIDTH, generator=chance)
    experts = tuple(range(1, 2 * num_experts, 2))
    return ExpertCall(component, layer, experts, tuple(counts), tuple(tokens), tokens_TD, f"request-{seed}")


def rows_of(call: ExpertCall) -> torch.Tensor:
    """What the stand-in for experts computes: a row tells its expert, layer and token."""
    experts = torch.repeat_interleave(torch.tensor(call.experts), torch.tensor(call.counts))
    rows_RD = call.tokens_TD[torch.tensor(call.token_of_R)]
    return (rows_RD * (experts[:, None] + 1) + call.layer).to(rows_RD.dtype)


has_desk = False
"""Whether servers read calls by the C source, which then finds no expert at hand."""


def empty_desk(info: ServiceInfo) -> Desk:
    functions = plane()
    assert functions is not None
    keys = [ExpertKey(component, 2, 3) for component in info.components]
    return Desk(functions, "portable", info.dtype, info.width, keys)


@contextmanager
def serving(
    compute: Compute = rows_of,
    *,
    limits: TransportLimits = LIMITS,
    info: ServiceInfo = INFO,
    incarnation: int = INCARNATION,
) -> Iterator[ExpertServer]:
    desk = empty_desk(info) if has_desk else None
    server = ExpertServer(compute, info, secret=SECRET, incarnation=incarnation, limits=limits, desk=desk)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def endpoint_of(port: int, *, name: str = "experts-0", incarnation: int = INCARNATION) -> Endpoint:
    return Endpoint(name, "127.0.0.1", port, incarnation)


@contextmanager
def connecting(
    port: int, *, limits: TransportLimits = LIMITS, incarnation: int = INCARNATION
) -> Iterator[ExpertConnection]:
    link = ExpertConnection(endpoint_of(port, incarnation=incarnation), secret=SECRET, limits=limits)
    try:
        yield link
    finally:
        link.close()


def ask(link: ExpertConnection, call: ExpertCall, timeout_s: float = 20.0) -> torch.Tensor:
    link.start(call, timeout_s=timeout_s)
    return link.finish()


def assert_serves(server: ExpertServer) -> None:
    """A new connection gets right rows."""
    with connecting(server.port) as link:
        call = make_call(5)
        assert torch.equal(ask(link, call), rows_of(call))


class RawRouter:
    """A router's socket without a router."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 20.0)
        self.socket.settimeout(20.0)

    def __enter__(self) -> RawRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        with suppress(ConnectionError):  # the server may have seen enough
            self.socket.sendall(data)

    def say(self, header: Header, body: bytes = b"") -> None:
        self.send(encode_header(header._replace(body_bytes=len(body))) + body)

    def hear(self) -> tuple[Header, bytes]:
        """The next frame that is not a heartbeat."""
        return hear_frame(self.socket)

    def introduce(self, *, secret: bytes = SECRET, incarnation: int = INCARNATION) -> bytes:
        """Up to the proof, which is returned; what the server says to it is still to be heard."""
        nonce = secrets.token_bytes(32)
        self.say(Header(Kind.HELLO, incarnation=incarnation), nonce)
        header, challenge = self.hear()
        assert header.kind == Kind.CHALLENGE
        proof = prove(secret, ROUTER, incarnation, nonce + challenge)
        self.say(Header(Kind.PROOF, incarnation=incarnation), proof)
        return proof

    def enter(self) -> None:
        """The whole handshake."""
        self.introduce()
        assert self.hear()[0].kind == Kind.WELCOME

    def ask(self, call: ExpertCall, *, sequence: int = 1, timeout_s: float = 20.0) -> None:
        head = encode_call(call, AGREED, sequence, round(timeout_s * 1e6))
        self.send(head + call.tokens_TD.numpy().tobytes())

    def is_closed_within(self, wait_s: float) -> bool:
        """Whether the server ends the connection; reads away what it says before."""
        deadline_s = time.monotonic() + wait_s
        while (rest_s := deadline_s - time.monotonic()) > 0:
            self.socket.settimeout(rest_s)
            try:
                if not self.socket.recv(4096):
                    return True
            except TimeoutError:
                return False
            except ConnectionError:
                return True
        return False


class FakeActor:
    """An actor's socket without an actor: proves the secret to one router, then follows a script."""

    def __init__(
        self,
        script: Callable[[socket.socket], None],
        *,
        secret: bytes = SECRET,
        info: bytes | None = None,
        incarnation: int = INCARNATION,
    ) -> None:
        self._script, self._secret, self._incarnation = script, secret, incarnation
        self._info = encode_info(INFO, MAX_ROWS) if info is None else info
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.is_done = threading.Event()
        """Set at the test's end; a script that does nothing waits for it."""
        self._thread = threading.Thread(target=self._run, name="fake-actor", daemon=True)

    def __enter__(self) -> FakeActor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_done.set()
        self._listener.close()
        self._thread.join(10.0)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        connected, _ = self._listener.accept()
        connected.settimeout(10.0)
        with connected, suppress(ConnectionError):
            _, nonce = hear_frame(connected)
            challenge = secrets.token_bytes(32)
            connected.sendall(encode_header(Header(Kind.CHALLENGE, body_bytes=32)) + challenge)
            hear_frame(connected)
            body = prove(self._secret, ACTOR, self._incarnation, nonce + challenge, self._info) + self._info
            welcome = Header(Kind.WELCOME, incarnation=self._incarnation, body_bytes=len(body))
            connected.sendall(encode_header(welcome) + body)
            self._script(connected)


def hear_frame(connected: socket.socket) -> tuple[Header, bytes]:
    """The next frame that is not a heartbeat. Raises ConnectionError at the end of the stream."""
    while True:
        header = decode_header(read_exactly(connected, HEADER_BYTES))
        body = read_exactly(connected, header.body_bytes)
        if header.kind != Kind.HEARTBEAT:
            return header, body


def heartbeat() -> bytes:
    return encode_header(Header(Kind.HEARTBEAT, incarnation=INCARNATION))


@contextmanager
def channel_pair(limits: TransportLimits = QUICK) -> Iterator[tuple[Channel, Channel]]:
    """Two channels that are connected with each other."""
    with raw_pair(limits) as (channel, other):
        second = Channel(other, limits)
        try:
            yield channel, second
        finally:
            second.close()


@contextmanager
def raw_pair(limits: TransportLimits = QUICK) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    far.settimeout(10.0)
    channel = Channel(near, limits)
    with far:
        try:
            yield channel, far
        finally:
            channel.close()


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Fails when threads or sockets that were opened inside outlive it by more than a few seconds."""
    before = _threads(), _num_sockets()
    yield
    deadline_s = time.monotonic() + 30.0
    while not (_threads() <= before[0] and _num_sockets() <= before[1]):
        assert time.monotonic() < deadline_s, (_threads() - before[0], _num_sockets(), before[1])
        time.sleep(0.01)


def eventually(condition: Callable[[], bool], wait_s: float = 30.0) -> bool:
    deadline_s = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.005)
    return True


def read_exactly(connected: socket.socket, num_bytes: int) -> bytes:
    """Raises ConnectionError at the end of the stream."""
    data = b""
    while len(data) < num_bytes:
        piece = connected.recv(num_bytes - len(data))
        if not piece:
            raise ConnectionError("the stream ended")
        data += piece
    return data


def _threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def _num_sockets() -> int:
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own is gone
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return count


def assert_one_line(lines: list[str], text: str) -> None:
    """Exactly one line is logged, and soon."""
    assert eventually(lambda: len(lines) >= 1)
    time.sleep(0.02)
    assert len(lines) == 1, lines
    assert text in lines[0]
