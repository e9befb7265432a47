"""A directory over actors gives the bits that the worker in this process gives, however its calls are cut."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.call import ExpertCall
from experts.errors import NotInGroup
from experts.remote_directory import RemoteDirectory
from experts.roster import Roster
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey
from tests.experts.fleet import (
    LAYERS,
    LIMITS,
    NAMES,
    NUM_EXPERTS,
    WIDTH,
    Fleet,
    assert_same,
    call_of,
    directory_over,
    make_worker,
)
from tests.experts.wire_peers import (
    SECRET,
    eventually,
)

pytestmark = pytest.mark.usefixtures("nothing_stays")


owners_st = st.dictionaries(
    st.builds(ExpertKey, st.just("model"), st.sampled_from(LAYERS), st.integers(0, NUM_EXPERTS - 1)),
    st.lists(st.sampled_from((*NAMES, "unknown")), unique=True).map(tuple),
)
calls_st = st.builds(
    call_of,
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1).map(sorted).map(tuple),
)


def test_any_split_gives_the_bits_of_the_local_worker(fleet: Fleet, local: ExpertWorker) -> None:
    for name in NAMES:
        fleet.start(name)

    with directory_over(local, fleet.roster({})) as directory:

        @given(st.lists(calls_st, min_size=1, max_size=3), owners_st)
        @settings(max_examples=30, deadline=None)
        def check(several: list[ExpertCall], chosen: dict[ExpertKey, tuple[str, ...]]) -> None:
            directory.update(fleet.roster(chosen))
            for call in several:
                assert_same(directory, local, call)

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
    with directory_over(local, fleet.roster()) as directory:
        assert_same(directory, local, call)
        assert directory.stats().remote_rows == 400


def test_rows_under_inference_mode_are_the_same(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(NAMES[0])
    fleet.start(NAMES[1])
    with directory_over(local, fleet.roster()) as directory, torch.inference_mode():
        assert_same(directory, local, call_of())


def test_actors_compute_only_what_they_own(
    fleet: Fleet, local: ExpertWorker, fleet_store: ExpertStore
) -> None:
    for number in (0, 1):
        group = [ExpertKey("model", layer, e) for layer in LAYERS for e in range(number, NUM_EXPERTS, 2)]
        fleet.start(NAMES[number], compute=make_worker(fleet_store, group=group, budget_bytes=40_000).compute)
    with directory_over(local, fleet.roster()) as directory:
        for seed in range(6):
            assert_same(directory, local, call_of(seed))
        stats = directory.stats()
        assert (stats.local_rows, stats.failovers) == (0, 0)


def test_error_in_this_process_leaves_no_answer_behind(
    fleet: Fleet, local: ExpertWorker, fleet_store: ExpertStore
) -> None:
    fleet.start(NAMES[0])
    few = make_worker(fleet_store, group=[ExpertKey("model", layer, 0) for layer in LAYERS])
    owners = {ExpertKey("model", layer, 1): (NAMES[0],) for layer in LAYERS}
    with directory_over(few, fleet.roster(owners)) as directory:
        with pytest.raises(NotInGroup):
            directory.run(call_of(0, experts=(1, 2)))
        directory.update(fleet.roster(owners))
        assert_same(directory, local, call_of(2, experts=(0, 1)))
        assert directory.stats().failovers == 0


def test_call_that_fits_nobody_leaves_every_connection_usable(fleet: Fleet, local: ExpertWorker) -> None:
    """The first actor used to stay asked for ever when the call to the second could not be written."""
    fleet.start(NAMES[0])
    fleet.start(NAMES[1])
    owners = {ExpertKey("model", 0, 0): (NAMES[0],), ExpertKey("model", 0, 2**33): (NAMES[1],)}
    good = ExpertCall("model", 0, (0,), (1,), (0,), torch.randn(1, WIDTH))
    call = ExpertCall("model", 0, (0, 2**33), (1, 1), (0, 0), torch.randn(1, WIDTH))
    with directory_over(local, fleet.roster(owners)) as directory:
        with pytest.raises(ValueError, match="does not fit"):
            directory.run(call)
        directory.update(fleet.roster(owners))
        rows: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: rows.append(directory.run(good)), daemon=True)
        thread.start()
        thread.join(5.0)
        assert torch.equal(rows[0], local.compute(good))
        assert directory.stats().remote_rows == 1


def test_closed_directory_computes_here_and_connects_no_more(fleet: Fleet, local: ExpertWorker) -> None:
    server = fleet.start(NAMES[0])
    directory = RemoteDirectory(local, fleet.roster(), SECRET, limits=LIMITS)
    directory.close()
    directory.update(fleet.roster())
    directory.close()
    assert directory.connected() == frozenset()
    assert torch.equal(directory.run(call_of()), local.compute(call_of()))
    assert eventually(lambda: server.num_connections == 0)


def test_closing_ends_a_call_that_waits(fleet: Fleet, local: ExpertWorker) -> None:
    is_computing, may_end = threading.Event(), threading.Event()

    def wait_and_compute(call: ExpertCall) -> torch.Tensor:
        is_computing.set()
        may_end.wait(10.0)
        return local.compute(call)

    fleet.start(NAMES[0], compute=wait_and_compute)
    lost: list[str] = []
    with directory_over(local, fleet.roster(), on_lost=lost.append) as directory:
        rows: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: rows.append(directory.run(call_of())), daemon=True)
        thread.start()
        assert is_computing.wait(5.0)
        directory.close()
        thread.join(5.0)
        assert torch.equal(rows[0], local.compute(call_of()))
        may_end.set()
    assert lost == []


def test_threads_that_need_the_same_actors_do_not_wait_for_each_other_for_ever(
    fleet: Fleet, local: ExpertWorker
) -> None:
    """Each used to take hold of the connections in the order of its own call's experts."""
    fleet.start(NAMES[0])
    fleet.start(NAMES[1])
    owners = {ExpertKey("model", 0, 0): (NAMES[0],), ExpertKey("model", 0, 1): (NAMES[1],)}
    owners |= {ExpertKey("model", 2, 0): (NAMES[1],), ExpertKey("model", 2, 1): (NAMES[0],)}
    with directory_over(local, fleet.roster(owners)) as directory:
        failures: list[int] = []

        def route(number: int) -> None:
            for _ in range(150):
                call = call_of(number, experts=(0, 1))
                if not torch.equal(directory.run(call), expected[number]):
                    failures.append(number)

        expected = [local.compute(call_of(number, experts=(0, 1))) for number in range(4)]
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
    wanted = {number: local.compute(call_of(number)) for number in range(10)}
    wrong: list[int] = []
    is_done = threading.Event()
    limits = replace(LIMITS, heartbeat_interval_s=0.005, heartbeat_misses=1000)
    with directory_over(local, fleet.roster(), limits) as directory:

        def route(first: int) -> None:
            number = first
            while not is_done.is_set():
                number = (number + 1) % 10
                if not torch.equal(directory.run(call_of(number)), wanted[number]):
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
            owners = {
                ExpertKey("model", layer, expert): (chance.choice(NAMES),)
                for layer in LAYERS
                for expert in range(NUM_EXPERTS)
            }
            directory.update(fleet.roster(owners))
            time.sleep(0.01)
        directory.close()
        is_done.set()
        for thread in threads:
            thread.join(10.0)
            assert not thread.is_alive()
    assert not wrong
    assert directory.stats().remote_rows > 0


def test_residents_are_those_of_the_process_that_would_compute_them(fleet_store: ExpertStore) -> None:
    """Of an actor what the roster tells; of this process only what no connected actor owns."""
    local = make_worker(fleet_store)
    local.compute(call_of(experts=(0, 1, 5)))
    fleet = Fleet(local)
    for name in NAMES[:2]:
        fleet.start(name)
    try:
        owners = {ExpertKey("model", 0, expert): (NAMES[expert % 2],) for expert in range(4)}
        told = {NAMES[0]: {("model", 0): frozenset({0, 2})}, NAMES[1]: {("model", 2): frozenset({3})}}
        roster = replace(fleet.roster(owners), resident=told)
        with directory_over(local, roster) as directory:
            assert directory.resident("model", 0) == {0, 2, 5}, "1 is held here, but computed by an actor"
            assert directory.resident("model", 2) == {3}
            later = replace(roster, resident={NAMES[1]: {("model", 0): frozenset({1})}})
            directory.update(later)
            assert directory.resident("model", 0) == {1, 5}
            directory.update(Roster(roster.version + 1, {}, owners, later.resident))
            assert directory.resident("model", 0) == {0, 1, 5}, "of actors that are gone nothing counts"
    finally:
        for server in fleet.servers.values():
            server.stop()
