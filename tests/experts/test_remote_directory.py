"""A directory over actors gives the bits that the worker in this process gives, whatever happens to the actors."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.errors import NotInGroup
from experts.frame import Kind, encode_header
from experts.handshake import encode_info
from experts.numerics import RowKernel, calibrate
from experts.remote_directory import RemoteDirectory, split_by_owner
from experts.roster import Owners, Roster
from experts.store import ExpertStore
from experts.transport import Endpoint, ExpertServer, ServiceInfo
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey
from tests.experts.wire_peers import (
    QUICK,
    SECRET,
    FakeActor,
    endpoint_of,
    eventually,
    hear_frame,
    heartbeat,
    nothing_left_behind,
    rows_of,
)

WIDTH, EXPERT_WIDTH, NUM_EXPERTS, LAYERS = 64, 24, 8, (0, 2)
KERNEL: RowKernel = calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], torch.float32)
LIMITS = TransportLimits(max_rows_per_frame=16)
HASTY = replace(QUICK, connect_timeout_s=1.0)
NAMES = ("experts-0", "experts-1", "experts-2")


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Iterator[ExpertStore]:
    opened = ExpertStore.open(tiny_store)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def local(store: ExpertStore) -> ExpertWorker:
    return _worker(store)


def _worker(store: ExpertStore, **options: Any) -> ExpertWorker:
    return ExpertWorker(store, KERNEL, torch.float32, widths={"model": WIDTH}, **options)


def _info(local: ExpertWorker) -> ServiceInfo:
    return ServiceInfo(WIDTH, local.dtype, local.numerics_class, ("model",))


class Fleet:
    """Servers by name, and the roster that tells where they are."""

    def __init__(self, local: ExpertWorker) -> None:
        self.servers: dict[str, ExpertServer] = {}
        self._local = local
        self._endpoints: dict[str, Endpoint] = {}
        self._version = 0

    def start(
        self,
        name: str,
        incarnation: int = 1,
        *,
        compute: Callable[[ExpertCall], torch.Tensor] | None = None,
        limits: TransportLimits = LIMITS,
        **info: Any,
    ) -> ExpertServer:
        """Start an actor, in place of one of the same name if there is one."""
        if name in self.servers:
            self.servers[name].stop()
        announced = replace(_info(self._local), **info)
        server = ExpertServer(
            compute or self._local.compute, announced, secret=SECRET, incarnation=incarnation, limits=limits
        )
        server.start()
        self.servers[name] = server
        self.announce(endpoint_of(server.port, name=name, incarnation=incarnation))
        return server

    def announce(self, endpoint: Endpoint) -> None:
        self._endpoints[endpoint.name] = endpoint

    def roster(self, owners: Owners | None = None) -> Roster:
        """A newer one each time. Experts are dealt out in turn unless told otherwise."""
        self._version += 1
        if owners is None:
            owners = {
                ExpertKey("model", layer, expert): (sorted(self._endpoints)[expert % len(self._endpoints)],)
                for layer in LAYERS
                for expert in range(NUM_EXPERTS)
            }
        return Roster(self._version, dict(self._endpoints), owners)


@pytest.fixture
def fleet(local: ExpertWorker) -> Iterator[Fleet]:
    started = Fleet(local)
    yield started
    for server in started.servers.values():
        server.stop()


@contextmanager
def _directory(
    local: ExpertWorker, roster: Roster, limits: TransportLimits = LIMITS, **options: Any
) -> Iterator[RemoteDirectory]:
    directory = RemoteDirectory(local, roster, SECRET, limits=limits, **options)
    try:
        yield directory
    finally:
        directory.close()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, keep = logging.getLogger("experts.remote_directory"), Keep(logging.WARNING)
    logger.addHandler(keep)
    yield lines
    logger.removeHandler(keep)


def _call(seed: int = 0, num_tokens: int = 5, experts: tuple[int, ...] = (0, 1, 2, 5, 7)) -> ExpertCall:
    chance = random.Random(seed)
    counts = tuple(chance.randint(1, 6) for _ in experts)
    tokens = tuple(chance.randrange(num_tokens) for _ in range(sum(counts)))
    tokens_TD = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return ExpertCall("model", LAYERS[seed % 2], experts, counts, tokens, tokens_TD, f"request-{seed}")


def _assert_same(directory: RemoteDirectory, local: ExpertWorker, call: ExpertCall) -> None:
    assert torch.equal(directory.run(call), local.compute(call))


owners = st.dictionaries(
    st.builds(ExpertKey, st.just("model"), st.sampled_from(LAYERS), st.integers(0, NUM_EXPERTS - 1)),
    st.lists(st.sampled_from((*NAMES, "unknown")), unique=True).map(tuple),
)
calls = st.builds(
    _call,
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1).map(sorted).map(tuple),
)


@given(calls, owners, st.frozensets(st.sampled_from(NAMES)))
@settings(max_examples=50, deadline=None)
def test_split_call_covers_every_row_once(
    call: ExpertCall, chosen: dict[ExpertKey, tuple[str, ...]], present: frozenset[str]
) -> None:
    shares = split_by_owner(call, chosen, present)
    assert sorted(row for share in shares.values() for row in share.rows) == list(range(call.num_rows))
    whole = rows_of(call)
    for name, share in shares.items():
        share.call.validate()
        assert name is None or name in present
        assert torch.equal(rows_of(share.call), whole[list(share.rows)])
        assert share.call.tokens_TD.shape[0] == len(set(share.call.token_of_R)) or len(shares) == 1
        for expert in share.call.experts:
            wanted = chosen.get(ExpertKey("model", call.layer, expert), ())
            assert name == next((owner for owner in wanted if owner in present), None)


def test_any_split_gives_the_bits_of_the_local_worker(fleet: Fleet, local: ExpertWorker) -> None:
    for name in NAMES:
        fleet.start(name)

    with _directory(local, fleet.roster({})) as directory:

        @given(st.lists(calls, min_size=1, max_size=3), owners)
        @settings(max_examples=30, deadline=None)
        def check(several: list[ExpertCall], chosen: dict[ExpertKey, tuple[str, ...]]) -> None:
            directory.update(fleet.roster(chosen))
            for call in several:
                _assert_same(directory, local, call)

        check()
        stats = directory.stats()
        assert stats.remote_rows > 0 and stats.local_rows > 0 and stats.hop_seconds > 0
        assert stats.failovers == 0
        assert directory.connected() == frozenset(NAMES)


def test_large_call_is_split_and_joined_bit_for_bit(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(NAMES[0])
    fleet.start(NAMES[1])
    tokens = tuple(range(100)) * 4
    call = ExpertCall("model", 0, (0, 1, 2, 3), (100,) * 4, tokens, torch.randn(100, WIDTH))
    with _directory(local, fleet.roster()) as directory:
        _assert_same(directory, local, call)
        assert directory.stats().remote_rows == 400


def test_rows_under_inference_mode_are_the_same(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(NAMES[0])
    fleet.start(NAMES[1])
    with _directory(local, fleet.roster()) as directory, torch.inference_mode():
        _assert_same(directory, local, _call())


def test_actors_compute_only_what_they_own(fleet: Fleet, local: ExpertWorker, store: ExpertStore) -> None:
    for number in (0, 1):
        group = [ExpertKey("model", layer, e) for layer in LAYERS for e in range(number, NUM_EXPERTS, 2)]
        fleet.start(NAMES[number], compute=_worker(store, group=group, budget_bytes=40_000).compute)
    with _directory(local, fleet.roster()) as directory:
        for seed in range(6):
            _assert_same(directory, local, _call(seed))
        stats = directory.stats()
        assert (stats.local_rows, stats.failovers) == (0, 0)


# Losing actors


def test_actor_lost_between_calls_is_replaced_by_local_rows(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(NAMES[0])
    fleet.start(NAMES[1])
    lost: list[str] = []
    with _directory(local, fleet.roster(), on_lost=lost.append) as directory:
        _assert_same(directory, local, _call())
        fleet.servers[NAMES[0]].stop()
        for seed in range(4):
            _assert_same(directory, local, _call(seed))
        assert eventually(lambda: set(lost) == {NAMES[0]})
        assert directory.connected() == {NAMES[1]}


def test_actor_lost_in_the_middle_of_a_call_is_replaced_by_local_rows(
    fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    may_end = threading.Event()

    def stop_and_compute(call: ExpertCall) -> torch.Tensor:
        threading.Thread(target=fleet.servers[NAMES[0]].stop).start()
        may_end.wait(10.0)
        return local.compute(call)

    fleet.start(NAMES[0], compute=stop_and_compute)
    fleet.start(NAMES[1])
    lost: list[str] = []
    with _directory(local, fleet.roster(), on_lost=lost.append) as directory:
        _assert_same(directory, local, _call())
        may_end.set()
        stats = directory.stats()
        assert stats.failovers == 1 and stats.remote_rows > 0 and stats.local_rows > 0
        assert lost == [NAMES[0]]
        assert len(logged) == 1 and "experts-0 did not answer, computing here" in logged[0]


def test_all_actors_lost_leave_the_local_worker(fleet: Fleet, local: ExpertWorker) -> None:
    for name in NAMES:
        fleet.start(name)
    with _directory(local, fleet.roster()) as directory:
        for server in fleet.servers.values():
            server.stop()
        _assert_same(directory, local, _call())


def test_late_actor_is_replaced_by_local_rows(fleet: Fleet, local: ExpertWorker) -> None:
    may_end = threading.Event()

    def wait_and_compute(call: ExpertCall) -> torch.Tensor:
        may_end.wait(10.0)
        return local.compute(call)

    fleet.start(NAMES[0], compute=wait_and_compute)
    lost: list[str] = []
    with _directory(local, fleet.roster(), call_timeout_s=0.2, on_lost=lost.append) as directory:
        _assert_same(directory, local, _call())
        assert directory.stats().failovers == 1
        assert lost == [NAMES[0]]
        may_end.set()


def test_silent_actor_is_noticed_while_nobody_calls(local: ExpertWorker) -> None:
    def hang(connected: socket.socket) -> None:
        while connected.recv(4096):
            pass

    lost = threading.Event()
    with FakeActor(hang, info=encode_info(_info(local), 16)) as actor:
        roster = Roster(1, {NAMES[0]: endpoint_of(actor.port)}, {})
        started_s = time.monotonic()
        with _directory(local, roster, HASTY, on_lost=lambda name: lost.set()) as directory:
            assert directory.connected() == {NAMES[0]}
            assert lost.wait(HASTY.silence_s + 2.0)
            assert time.monotonic() - started_s >= 0.9 * HASTY.silence_s
            assert directory.connected() == frozenset()


@pytest.mark.parametrize("error", [NotInGroup("model/0/0"), RuntimeError("a bug")])
def test_error_answer_is_computed_here_and_the_actor_is_not_reported_lost(
    error: Exception, fleet: Fleet, local: ExpertWorker
) -> None:
    def fail(call: ExpertCall) -> torch.Tensor:
        raise error

    fleet.start(NAMES[0], compute=fail)
    fleet.start(NAMES[1])
    lost: list[str] = []
    with _directory(local, fleet.roster(), on_lost=lost.append) as directory:
        for seed in range(3):
            _assert_same(directory, local, _call(seed))
        assert directory.stats().failovers == 3
        assert directory.connected() == {NAMES[0], NAMES[1]}
    assert lost == []


def test_error_in_this_process_leaves_no_answer_behind(
    fleet: Fleet, local: ExpertWorker, store: ExpertStore
) -> None:
    fleet.start(NAMES[0])
    few = _worker(store, group=[ExpertKey("model", layer, 0) for layer in LAYERS])
    owner = {ExpertKey("model", layer, 1): (NAMES[0],) for layer in LAYERS}
    with _directory(few, fleet.roster(owner)) as directory:
        with pytest.raises(NotInGroup):
            directory.run(_call(0, experts=(1, 2)))
        directory.update(fleet.roster(owner))
        _assert_same(directory, local, _call(2, experts=(0, 1)))
        assert directory.stats().failovers == 0


def test_call_that_fits_nobody_leaves_every_connection_usable(fleet: Fleet, local: ExpertWorker) -> None:
    """The first actor used to stay asked for ever when the call to the second could not be written."""
    fleet.start(NAMES[0])
    fleet.start(NAMES[1])
    owner = {ExpertKey("model", 0, 0): (NAMES[0],), ExpertKey("model", 0, 2**33): (NAMES[1],)}
    good = ExpertCall("model", 0, (0,), (1,), (0,), torch.randn(1, WIDTH))
    call = ExpertCall("model", 0, (0, 2**33), (1, 1), (0, 0), torch.randn(1, WIDTH))
    with _directory(local, fleet.roster(owner)) as directory:
        with pytest.raises(ValueError, match="does not fit"):
            directory.run(call)
        directory.update(fleet.roster(owner))
        rows: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: rows.append(directory.run(good)), daemon=True)
        thread.start()
        thread.join(5.0)
        assert torch.equal(rows[0], local.compute(good))
        assert directory.stats().remote_rows == 1


# Following the roster


def test_restarted_actor_is_used_again(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(NAMES[0])
    with _directory(local, fleet.roster()) as directory:
        for incarnation in (2, 3, 4):
            _assert_same(directory, local, _call(incarnation))
            remote_rows = directory.stats().remote_rows
            fleet.start(NAMES[0], incarnation)
            _assert_same(directory, local, _call(incarnation))
            directory.update(fleet.roster())
            _assert_same(directory, local, _call(incarnation))
            assert directory.stats().remote_rows == remote_rows + _call(incarnation).num_rows
        assert directory.stats().local_rows > 0


def test_actor_that_lost_its_connection_is_reached_again_by_the_same_roster(
    fleet: Fleet, local: ExpertWorker
) -> None:
    server = fleet.start(NAMES[0])
    roster = fleet.roster()
    lost = threading.Event()
    with _directory(local, roster, HASTY, on_lost=lambda name: lost.set()) as directory:
        for channel in list(server._listener._proven):
            channel.end("cut")
        assert lost.wait(5.0)
        assert directory.connected() == frozenset()
        directory.update(roster)
        _assert_same(directory, local, _call())
        assert directory.stats().local_rows == 0


def test_older_roster_is_ignored(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(NAMES[0])
    old = fleet.roster()
    fleet.start(NAMES[1])
    with _directory(local, fleet.roster()) as directory:
        directory.update(old)
        directory.update(replace(old, endpoints={}))
        assert directory.connected() == {NAMES[0], NAMES[1]}


def test_actor_that_left_the_roster_is_let_go_and_not_reported_lost(
    fleet: Fleet, local: ExpertWorker
) -> None:
    server = fleet.start(NAMES[0])
    lost: list[str] = []
    with _directory(local, fleet.roster(), HASTY, on_lost=lost.append) as directory:
        directory.update(Roster(100, {}, {}))
        assert directory.connected() == frozenset()
        assert eventually(lambda: server.num_connections == 0)
        _assert_same(directory, local, _call())
        time.sleep(3 * HASTY.heartbeat_interval_s)
    assert lost == []


def test_reply_of_an_old_incarnation_is_never_taken(fleet: Fleet, local: ExpertWorker) -> None:
    """The old life answers zeros, late; the new one is already in the roster."""
    is_computing, may_end = threading.Event(), threading.Event()

    def zeros_late(call: ExpertCall) -> torch.Tensor:
        is_computing.set()
        may_end.wait(10.0)
        return torch.zeros(call.num_rows, WIDTH)

    fleet.start(NAMES[0], 1, compute=zeros_late)
    old = fleet.servers.pop(NAMES[0])
    lost: list[str] = []
    with _directory(local, fleet.roster(), on_lost=lost.append) as directory:
        rows: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: rows.append(directory.run(_call())), daemon=True)
        thread.start()
        assert is_computing.wait(5.0)
        fleet.start(NAMES[0], 2)
        directory.update(fleet.roster())
        may_end.set()
        thread.join(5.0)
        assert torch.equal(rows[0], local.compute(_call()))
        for seed in range(3):
            _assert_same(directory, local, _call(seed))
        assert directory.stats().failovers == 1
    assert lost == []
    old.stop()


def test_frame_of_an_old_incarnation_is_refused(local: ExpertWorker) -> None:
    def answer_as_before(connected: socket.socket) -> None:
        header, _ = hear_frame(connected)
        body = bytes(header.num_rows * WIDTH * 4)
        old = header._replace(
            kind=Kind.ROWS, incarnation=6, num_tokens=0, num_experts=0, trace_bytes=0, layer=0, deadline_us=0
        )
        connected.sendall(encode_header(old._replace(body_bytes=len(body))) + body)

    call = _call(0, experts=(0, 1))
    owner = {ExpertKey("model", 0, expert): (NAMES[0],) for expert in range(NUM_EXPERTS)}
    with ExitStack() as stack:
        actor = stack.enter_context(FakeActor(answer_as_before, info=encode_info(_info(local), 16)))
        roster = Roster(1, {NAMES[0]: endpoint_of(actor.port)}, owner)
        directory = stack.enter_context(_directory(local, roster))
        _assert_same(directory, local, call)
        assert directory.stats().failovers == 1


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"dtype": torch.bfloat16}, "computes in torch.bfloat16, here torch.float32"),
        ({"width": WIDTH * 2}, "has component 'model' of width 128, here 64"),
        ({"components": ("talker",)}, "has no component 'model'"),
        ({"components": ("model", "talker")}, "has component 'talker' of width 64, here None"),
    ],
)
def test_actor_that_does_not_fit_is_refused_with_a_warning(
    info: dict[str, Any], message: str, fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    fleet.start(NAMES[0], **info)
    fleet.start(NAMES[1])
    with _directory(local, fleet.roster()) as directory:
        assert directory.connected() == {NAMES[1]}
        for seed in range(3):
            _assert_same(directory, local, _call(seed))
        assert directory.stats().failovers == 0
        directory.update(fleet.roster())
        assert len(logged) == 1 and "experts-0 is refused" in logged[0] and message in logged[0]
        assert eventually(lambda: fleet.servers[NAMES[0]].num_connections == 0)
        fleet.start(NAMES[0], 2)
        directory.update(fleet.roster())
        assert directory.connected() == {NAMES[0], NAMES[1]}


def test_actor_that_is_given_a_component_it_does_not_have_is_let_go(
    fleet: Fleet, store: ExpertStore, logged: list[str]
) -> None:
    both = ExpertWorker(store, KERNEL, torch.float32, widths={"model": WIDTH, "talker": WIDTH})
    fleet.start(NAMES[0])
    with _directory(both, fleet.roster()) as directory:
        assert directory.connected() == {NAMES[0]}
        directory.update(fleet.roster({ExpertKey("talker", 0, 0): (NAMES[0],)}))
        assert directory.connected() == frozenset()
        assert len(logged) == 1 and "has no component 'talker'" in logged[0]


def test_actor_of_another_numerics_class_is_used_with_a_warning(
    fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    fleet.start(NAMES[0], numerics_class="other")
    with _directory(local, fleet.roster()) as directory:
        assert directory.connected() == {NAMES[0]}
    assert len(logged) == 1 and "another numerics class (other" in logged[0]


def test_actor_with_quantised_experts_is_refused_by_a_router_without(
    fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    fleet.start(NAMES[0], numerics_class=local.numerics_class + "/int4-g32/pack-1")
    with _directory(local, fleet.roster()) as directory:
        assert directory.connected() == frozenset()
    assert len(logged) == 1 and "has experts in int4-g32, here in full precision" in logged[0]


def test_actor_that_cannot_be_reached_is_left_out_with_a_warning(
    fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    fleet.start(NAMES[0]).stop()
    fleet.start(NAMES[1])
    with _directory(local, fleet.roster()) as directory:
        assert directory.connected() == {NAMES[1]}
        _assert_same(directory, local, _call())
    assert len(logged) == 1 and "cannot reach expert actor experts-0" in logged[0]


def test_connection_is_tended_while_others_are_slow_to_come(fleet: Fleet, local: ExpertWorker) -> None:
    """A new connection used to get no heartbeat until the whole roster was connected, and was closed as idle."""
    limits = replace(HASTY, handshake_timeout_s=1.0)
    fleet.start(NAMES[0], limits=limits)
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        directory = stack.enter_context(_directory(local, Roster(0, {}, {}), limits))
        fleet.announce(endpoint_of(listener.getsockname()[1], name=NAMES[1]))
        directory.update(fleet.roster())
        assert directory.connected() == {NAMES[0]}
        _assert_same(directory, local, _call())
        assert directory.stats().failovers == 0


# Ending


def test_closed_directory_computes_here_and_connects_no_more(fleet: Fleet, local: ExpertWorker) -> None:
    server = fleet.start(NAMES[0])
    directory = RemoteDirectory(local, fleet.roster(), SECRET, limits=LIMITS)
    directory.close()
    directory.update(fleet.roster())
    directory.close()
    assert directory.connected() == frozenset()
    assert torch.equal(directory.run(_call()), local.compute(_call()))
    assert eventually(lambda: server.num_connections == 0)


def test_closing_ends_a_call_that_waits(fleet: Fleet, local: ExpertWorker) -> None:
    is_computing, may_end = threading.Event(), threading.Event()

    def wait_and_compute(call: ExpertCall) -> torch.Tensor:
        is_computing.set()
        may_end.wait(10.0)
        return local.compute(call)

    fleet.start(NAMES[0], compute=wait_and_compute)
    lost: list[str] = []
    with _directory(local, fleet.roster(), on_lost=lost.append) as directory:
        rows: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: rows.append(directory.run(_call())), daemon=True)
        thread.start()
        assert is_computing.wait(5.0)
        directory.close()
        thread.join(5.0)
        assert torch.equal(rows[0], local.compute(_call()))
        may_end.set()
    assert lost == []


# Several threads


def test_threads_that_need_the_same_actors_do_not_wait_for_each_other_for_ever(
    fleet: Fleet, local: ExpertWorker
) -> None:
    """Each used to take hold of the connections in the order of its own call's experts."""
    fleet.start(NAMES[0])
    fleet.start(NAMES[1])
    owner = {ExpertKey("model", 0, 0): (NAMES[0],), ExpertKey("model", 0, 1): (NAMES[1],)}
    owner |= {ExpertKey("model", 2, 0): (NAMES[1],), ExpertKey("model", 2, 1): (NAMES[0],)}
    with _directory(local, fleet.roster(owner)) as directory:
        failures: list[int] = []

        def route(number: int) -> None:
            for _ in range(150):
                call = _call(number, experts=(0, 1))
                if not torch.equal(directory.run(call), expected[number]):
                    failures.append(number)

        expected = [local.compute(_call(number, experts=(0, 1))) for number in range(4)]
        threads = [threading.Thread(target=route, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
            assert not thread.is_alive()
        assert not failures
        assert directory.stats().failovers == 0


def test_rows_stay_right_while_actors_and_rosters_come_and_go(fleet: Fleet, local: ExpertWorker) -> None:
    """Two threads call; others restart actors, change owners, send heartbeats all the time, and close at the end."""
    chance = random.Random(0)
    for name in NAMES:
        fleet.start(name)
    wanted = {number: local.compute(_call(number)) for number in range(10)}
    wrong: list[int] = []
    is_done = threading.Event()
    limits = replace(LIMITS, heartbeat_interval_s=0.005, heartbeat_misses=1000)
    with _directory(local, fleet.roster(), limits) as directory:

        def route(first: int) -> None:
            number = first
            while not is_done.is_set():
                number = (number + 1) % 10
                if not torch.equal(directory.run(_call(number)), wanted[number]):
                    wrong.append(number)

        threads = [threading.Thread(target=route, args=(first,), daemon=True) for first in (0, 5)]
        for thread in threads:
            thread.start()
        ends_s = time.monotonic() + 1.0
        incarnation = 1
        while time.monotonic() < ends_s:
            incarnation += 1
            if chance.random() < 0.5:
                fleet.start(chance.choice(NAMES), incarnation)
            owner = {
                ExpertKey("model", layer, expert): (chance.choice(NAMES),)
                for layer in LAYERS
                for expert in range(NUM_EXPERTS)
            }
            directory.update(fleet.roster(owner))
            time.sleep(0.01)
        directory.close()
        is_done.set()
        for thread in threads:
            thread.join(10.0)
            assert not thread.is_alive()
    assert not wrong
    assert directory.stats().remote_rows > 0


def test_heartbeats_of_a_fake_actor_keep_it_connected(local: ExpertWorker) -> None:
    def beat(connected: socket.socket) -> None:
        while not actor.is_done.wait(0.03):
            connected.sendall(heartbeat())

    lost: list[str] = []
    with FakeActor(beat, info=encode_info(_info(local), 16)) as actor:
        roster = Roster(1, {NAMES[0]: endpoint_of(actor.port)}, {})
        with _directory(local, roster, HASTY, on_lost=lost.append) as directory:
            time.sleep(2 * HASTY.silence_s)
            assert directory.connected() == {NAMES[0]}
    assert lost == []


def test_residents_are_those_of_the_process_that_would_compute_them(store: ExpertStore) -> None:
    """Of an actor what the roster tells; of this process only what no connected actor owns."""
    local = _worker(store)
    local.compute(_call(experts=(0, 1, 5)))
    fleet = Fleet(local)
    for name in NAMES[:2]:
        fleet.start(name)
    try:
        owner = {ExpertKey("model", 0, expert): (NAMES[expert % 2],) for expert in range(4)}
        told = {NAMES[0]: {("model", 0): frozenset({0, 2})}, NAMES[1]: {("model", 2): frozenset({3})}}
        roster = replace(fleet.roster(owner), resident=told)
        with _directory(local, roster) as directory:
            assert directory.resident("model", 0) == {0, 2, 5}, "1 is held here, but computed by an actor"
            assert directory.resident("model", 2) == {3}
            later = replace(roster, resident={NAMES[1]: {("model", 0): frozenset({1})}})
            directory.update(later)
            assert directory.resident("model", 0) == {1, 5}
            directory.update(Roster(roster.version + 1, {}, owner, later.resident))
            assert directory.resident("model", 0) == {0, 1, 5}, "of actors that are gone nothing counts"
    finally:
        for server in fleet.servers.values():
            server.stop()
