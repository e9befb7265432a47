"""Layers whose actors the C source asks itself: the bits and the accounts of Python's way, whatever an actor does."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.directory import DirectoryStats
from experts.exchange import Exchange
from experts.frame import Agreement, ErrorCode, Header, Kind, encode_error, encode_header
from experts.native_plane import plane
from experts.native_products import chosen_level
from experts.remote_directory import DirectoryOptions, RemoteDirectory
from experts.roster import Roster
from experts.server import ExpertServer
from router.kv_cache import KvPool
from router.layer_run import RunTimes
from router.loading import EngineOptions, LoadedEngine
from router.step_batch import StepOutput
from tests.engines import open_engine
from tests.expert_servers import SECRET, expert_servers
from tests.meddler import Deed, Meddler
from tests.router.test_layer_run import STEPS, _assert_same, _batch, _forward

if plane() is None or chosen_level(torch.float32) is None:
    pytest.skip("native products are not used here", allow_module_level=True)
LIMITS = TransportLimits(heartbeat_interval_s=0.1, heartbeat_misses=200, spin_s=0.002)
SLOTS = [8 * sum(span.count for span in spans) for spans in STEPS]
Found = tuple[list[StepOutput], KvPool, object]


@dataclass
class Asked:
    """An engine whose experts are with actors, and who stands before each of these."""

    loaded: LoadedEngine
    meddlers: list[Meddler]
    roster: Roster
    servers: list[ExpertServer]

    @property
    def directory(self) -> RemoteDirectory:
        assert isinstance(self.loaded.directory, RemoteDirectory)
        return self.loaded.directory

    def forward(self) -> Found:
        return _forward(self.loaded, [_batch(spans) for spans in STEPS])


@contextmanager
def asked_engine(
    root: Path, num_actors: int, *, timeout_s: float = 30.0, limits: TransportLimits = LIMITS
) -> Iterator[Asked]:
    with ExitStack() as stack:
        # Here and not around a step: several threads compute steps.
        stack.enter_context(mock.patch.object(RunTimes, "most_layers", lambda *_: 48))
        servers: list[ExpertServer] = []
        roster = stack.enter_context(expert_servers(root, num_actors, "float32", servers=servers))
        meddlers = [stack.enter_context(Meddler(endpoint)) for endpoint in roster.endpoints.values()]
        roster = replace(roster, endpoints={each.endpoint.name: each.endpoint for each in meddlers})
        options = DirectoryOptions(call_timeout_s=timeout_s)
        loaded = open_engine(
            root,
            EngineOptions(dtype="float32"),
            lambda worker: RemoteDirectory(worker, roster, SECRET, limits=limits, options=options),
        )
        stack.callback(loaded.close)
        yield Asked(loaded, meddlers, roster, servers)


@pytest.fixture(scope="module")
def expected(stories_store: Path) -> Iterator[Found]:
    """What an engine computes that asks nobody."""
    loaded = open_engine(stories_store, EngineOptions(dtype="float32"))
    yield _forward(loaded, [_batch(spans) for spans in STEPS])
    loaded.close()


@contextmanager
def python_s_calls() -> Iterator[list[int]]:
    """Layers that are asked for in Python."""
    layers: list[int] = []
    compute = RemoteDirectory._compute

    def noted(directory: RemoteDirectory, call: object, *more: object) -> object:
        layers.append(call.layer)  # type: ignore[attr-defined]
        return compute(directory, call, *more)  # type: ignore[arg-type]

    with mock.patch.object(RemoteDirectory, "_compute", noted):
        yield layers


@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_bits_and_accounts_are_those_of_python(stories_store: Path, expected: Found, num_actors: int) -> None:
    with asked_engine(stories_store, num_actors) as asked, python_s_calls() as calls:
        for turn in range(2):  # before and after the actors have read their experts
            _assert_same(asked.forward(), expected)
            assert not calls, "everything is asked by the C source"
            stats = asked.directory.stats()
            assert (stats.local_rows, stats.remote_rows) == (0, (turn + 1) * 6 * sum(SLOTS))
        assert stats.hop_seconds > 0 and stats.failovers == 0
        with mock.patch.object(RemoteDirectory, "exchange", lambda *_: None):
            _assert_same(asked.forward(), expected)
        by_python = asked.directory.stats()
        assert by_python.remote_rows == 3 * 6 * sum(SLOTS)
        for name, latency in by_python.latencies.items():
            assert 2 * latency.answers == 3 * stats.latencies[name].answers
        for name in asked.roster.endpoints:
            assert asked.directory.outstanding_rows(name) == 0


def test_answers_are_given_as_long_as_python_gives_them(stories_store: Path, expected: Found) -> None:
    """Deadlines follow from earlier answers; both ways keep the same book."""
    with asked_engine(stories_store, 1) as asked:
        for _ in range(8):
            _assert_same(asked.forward(), expected)
        times = asked.directory._asker.times
        recent = times._actors["experts-0"]
        assert recent.p99_s, "enough answers of one size"
        for size, p99_s in recent.p99_s.items():
            assert times.usual_ns("experts-0")[size] == pytest.approx(20 * p99_s * 1e9)


# What an actor may do instead of answering


def leave(near: socket.socket, header: Header, body: bytes) -> bool:
    return False


def leave_in_rows(near: socket.socket, header: Header, body: bytes) -> bool:
    near.sendall(encode_header(header) + body[: len(body) // 2])
    return False


def leave_in_header(near: socket.socket, header: Header, body: bytes) -> bool:
    near.sendall(encode_header(header)[:40])
    return False


def say_nothing(near: socket.socket, header: Header, body: bytes) -> bool:
    return True


def dawdle(near: socket.socket, header: Header, body: bytes) -> bool:
    near.sendall(encode_header(header))
    for place in range(40):
        near.sendall(body[place : place + 1])
        time.sleep(0.05)
    return True


def fail(near: socket.socket, header: Header, body: bytes) -> bool:
    agreed = Agreement(header.incarnation, header.width, torch.float32, ("model",), 1024)
    near.sendall(encode_error(agreed, header.sequence, ErrorCode.EXPERT, "a test"))
    return True


def say_nonsense(near: socket.socket, header: Header, body: bytes) -> bool:
    near.sendall(b"x" * 200)
    return True


def answer_with_none(near: socket.socket, header: Header, body: bytes) -> bool:
    near.sendall(encode_header(header) + b"\xff" * len(body))
    return True


def lying(**change: int) -> Deed:
    def lie(near: socket.socket, header: Header, body: bytes) -> bool:
        near.sendall(encode_header(header._replace(**change)) + body)
        return True

    return lie


DEEDS: dict[str, tuple[Deed, str]] = {
    "leaves": (leave, "lost"),
    "leaves in its rows": (leave_in_rows, "lost"),
    "leaves in its header": (leave_in_header, "lost"),
    "says nothing": (say_nothing, "late"),
    "sends byte by byte": (dawdle, "late"),
    "answers with an error": (fail, "error"),
    "says nonsense": (say_nonsense, "lost"),
    "answers with no numbers": (answer_with_none, "not finite"),
    "counts wrongly": (lying(sequence=77), "lost"),
    "is another one": (lying(incarnation=77), "lost"),
    "sends too much": (lying(body_bytes=1 << 31), "lost"),
    "sends other rows": (lying(num_rows=1), "lost"),
}


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("num_actors", [1, 2])
def test_layer_that_an_actor_spoils_has_the_same_bits(
    stories_store: Path, expected: Found, num_actors: int, deed: str
) -> None:
    """In the middle of a run, which goes on afterwards."""
    do, kind = DEEDS[deed]
    with asked_engine(stories_store, num_actors, timeout_s=2.0) as asked:
        meddler = asked.meddlers[-1]
        meddler.arm(do, skip=8)
        _assert_same(asked.forward(), expected)
        assert meddler.is_done.is_set()
        stats = asked.directory.stats()
        assert {name: count for name, count in stats.failovers_by_kind.items() if count} == {kind: 1}
        assert stats.local_rows + stats.remote_rows == 6 * sum(SLOTS)
        assert stats.local_rows > 0
        _assert_nothing_is_held(asked)


def test_slow_answer_is_waited_for_by_python_and_the_run_goes_on(
    stories_store: Path, expected: Found
) -> None:
    def wait(near: socket.socket, header: Header, body: bytes) -> bool:
        beat = encode_header(Header(Kind.HEARTBEAT, incarnation=header.incarnation))
        for _ in range(6):
            time.sleep(0.05)
            near.sendall(beat)
        near.sendall(encode_header(header) + body)
        return True

    with asked_engine(stories_store, 2) as asked, python_s_calls() as calls:
        asked.meddlers[0].arm(wait, skip=2)
        _assert_same(asked.forward(), expected)
        stats = asked.directory.stats()
        assert stats.failovers == 0 and not calls
        assert stats.remote_rows == 6 * sum(SLOTS) and stats.local_rows == 0
        assert stats.hop_seconds > 0.3
        _assert_nothing_is_held(asked)


def _assert_nothing_is_held(asked: Asked) -> None:
    """Another thread can ask, and no rows are expected."""
    done: list[DirectoryStats] = []

    def look() -> None:
        for link in asked.directory._links.view.links.values():
            link.tend()
            assert link._reading.acquire(timeout=5.0)
            link._reading.release()
        done.append(asked.directory.stats())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(10.0)
    assert done
    for name in asked.roster.endpoints:
        assert asked.directory.outstanding_rows(name) == 0


def test_directory_that_closes_while_a_run_waits_ends_it(stories_store: Path, expected: Found) -> None:
    """Without the actor the rows are computed here."""
    with asked_engine(stories_store, 1, limits=replace(LIMITS, spin_s=20.0)) as asked:

        def close_elsewhere(near: socket.socket, header: Header, body: bytes) -> bool:
            for link in asked.directory._links.view.links.values():
                link.close()
            return True

        asked.meddlers[0].arm(close_elsewhere, skip=3)
        began = time.monotonic()
        _assert_same(asked.forward(), expected)
        assert time.monotonic() - began < 10.0
        assert asked.directory.stats().failovers_by_kind["lost"] == 1


def test_roster_that_changes_between_steps_changes_who_is_asked(stories_store: Path, expected: Found) -> None:
    with asked_engine(stories_store, 2) as asked:
        roster, directory = asked.roster, asked.directory
        first, second = roster.endpoints
        alone = dict.fromkeys(roster.owners, (first,))
        nobody = {key: (first,) if key.layer != 2 else () for key in roster.owners}
        both = dict.fromkeys(roster.owners, (first, second))
        for number, owners in enumerate((roster.owners, alone, nobody, both, roster.owners), 2):
            directory.update(Roster(number, roster.endpoints, owners))
            before = directory.stats()
            with python_s_calls() as calls:
                _assert_same(asked.forward(), expected)
            after = directory.stats()
            local_layers = {2: 0, 3: 0, 4: 1, 5: 0, 6: 0}[number]
            assert after.local_rows - before.local_rows == local_layers * sum(SLOTS)
            assert bool(calls) == (owners in (nobody, both)), "a choice, or nobody, is for Python"
        directory.update(Roster(9, {}, roster.owners))
        _assert_same(asked.forward(), expected)


def test_two_routers_ask_the_same_actors(stories_store: Path, expected: Found) -> None:
    with asked_engine(stories_store, 2) as asked:
        endpoints = {each._behind.name: each._behind for each in asked.meddlers}
        roster = replace(asked.roster, endpoints=endpoints)
        other = open_engine(
            stories_store,
            EngineOptions(dtype="float32"),
            lambda worker: RemoteDirectory(worker, roster, SECRET, limits=LIMITS),
        )
        found: list[Found] = []
        thread = threading.Thread(
            target=lambda: found.extend(Asked(other, [], roster, []).forward() for _ in range(3))
        )
        thread.start()
        for _ in range(3):
            _assert_same(asked.forward(), expected)
        thread.join()
        other.close()
        assert len(found) == 3
        for each in found:
            _assert_same(each, expected)


def test_two_threads_share_a_directory(stories_store: Path, expected: Found) -> None:
    """Each holds all connections while the C source asks, and none while it does not."""
    with asked_engine(stories_store, 3) as asked:
        tokens_TD = torch.randn(
            2, asked.loaded.config.hidden_size, generator=torch.Generator().manual_seed(1)
        )
        call = ExpertCall("model", 1, (3, 30, 63), (1, 2, 1), (0, 0, 1, 1), tokens_TD, "other")
        rows_RD = asked.loaded.worker.compute(call)
        ended = threading.Event()

        def ask_again_and_again() -> None:
            while not ended.is_set():
                assert torch.equal(asked.directory.run(call), rows_RD)

        thread = threading.Thread(target=ask_again_and_again)
        thread.start()
        for _ in range(5):
            _assert_same(asked.forward(), expected)
        ended.set()
        thread.join(10.0)
        assert not thread.is_alive()


def test_exchange_is_refused_what_does_not_fit_a_frame(stories_store: Path) -> None:
    with asked_engine(stories_store, 1) as asked:
        exchange = asked.directory.exchange("model", (0, 1), 64)
        assert isinstance(exchange, Exchange)
        width = asked.loaded.config.hidden_size
        assert exchange.takes(16, 128, width, torch.float32)
        for size in (
            (16, 1025, width, torch.float32),
            (1025, 16, width, torch.float32),
            (16, 128, width + 1, torch.float32),
            (16, 128, width, torch.bfloat16),
        ):
            assert not exchange.takes(*size)
        for name in ("x" * 65, "é", "a\nb"):
            assert not exchange.begin(name)
        assert exchange.begin("x" * 64)
        exchange.end()
        assert asked.directory.exchange("model", (0, 99), 64) is None


def test_suspended_actor_is_not_asked_by_the_c_source(stories_store: Path) -> None:
    with asked_engine(stories_store, 2) as asked:
        layers = tuple(range(6))
        assert asked.directory.exchange("model", layers, 64) is not None
        suspensions = asked.directory._asker.suspensions
        suspensions.note("experts-1", ("model", 3), time.monotonic())
        assert asked.directory.exchange("model", layers, 64) is None
        suspensions.clear("experts-1", ("model", 3))
        suspensions.note("experts-9", ("model", 3), time.monotonic())
        assert asked.directory.exchange("model", layers, 64) is not None


@pytest.mark.parametrize("comes", [True, False], ids=["comes", "is lost"])
def test_time_that_the_c_source_waits_in_vain_belongs_to_the_hop(
    stories_store: Path, expected: Found, comes: bool
) -> None:
    def wait(near: socket.socket, header: Header, body: bytes) -> bool:
        time.sleep(2.0)
        if comes:
            near.sendall(encode_header(header) + body)
        return comes

    patience_s = 1.5 if comes else 20.0  # within which C waits, before Python does
    with (
        mock.patch("experts.exchange.PATIENCE_S", patience_s),
        asked_engine(stories_store, 1) as asked,
    ):
        asked.forward()
        before_s = asked.directory.stats().hop_seconds
        asked.meddlers[0].arm(wait, skip=2)
        _assert_same(asked.forward(), expected)
        assert asked.directory.stats().hop_seconds - before_s > 1.5


def test_answers_without_a_deadline_are_waited_for(stories_store: Path, expected: Found) -> None:
    def wait(near: socket.socket, header: Header, body: bytes) -> bool:
        time.sleep(0.5)
        near.sendall(encode_header(header) + body)
        return True

    with asked_engine(stories_store, 1, timeout_s=math.inf) as asked:
        asked.meddlers[0].arm(wait, skip=2)
        _assert_same(asked.forward(), expected)
        stats = asked.directory.stats()
        assert stats.failovers == 0 and stats.local_rows == 0


def test_more_actors_than_the_c_source_can_number_are_asked_by_python(
    stories_store: Path, expected: Found
) -> None:
    with (
        mock.patch("experts.exchange.MOST_PEERS", 1),
        mock.patch("experts.remote_directory.MOST_PEERS", 1),
        asked_engine(stories_store, 2) as asked,
    ):
        assert asked.directory.exchange("model", (0, 1), 64) is None
        _assert_same(asked.forward(), expected)
        assert asked.directory.stats().failovers == 0
