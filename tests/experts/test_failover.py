"""Rows of an actor that is lost, late or in error are computed elsewhere, with the same bits, or not at all."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from experts.call import ExpertCall
from experts.errors import ExpertUnavailable, NotInGroup
from experts.frame import Kind, encode_header
from experts.handshake import encode_info
from experts.remote_directory import DirectoryOptions
from experts.roster import Owners, Roster
from experts.server import Compute
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from tests.experts.fleet import (
    ALL_KEYS,
    NAMES,
    WIDTH,
    Fleet,
    assert_same,
    call_of,
    directory_over,
    info_of,
    make_worker,
    owned_by,
)
from tests.experts.wire_peers import FakeActor, endpoint_of, eventually, hear_frame

pytestmark = pytest.mark.usefixtures("nothing_stays")

A, B, C = NAMES


def fail_with(error: Exception) -> Compute:
    def fail(call: ExpertCall) -> torch.Tensor:
        raise error

    return fail


# Lost actors whose experts nobody else has


def test_actor_lost_between_calls_is_replaced_by_local_rows(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(A)
    fleet.start(B)
    lost: list[str] = []
    with directory_over(local, fleet.roster(), on_lost=lost.append) as directory:
        assert_same(directory, local, call_of())
        fleet.servers[A].stop()
        for seed in range(4):
            assert_same(directory, local, call_of(seed))
        assert eventually(lambda: set(lost) == {A})
        assert directory.connected() == {B}


def test_actor_lost_in_the_middle_of_a_call_is_replaced_by_local_rows(
    fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    may_end = threading.Event()

    def stop_and_compute(call: ExpertCall) -> torch.Tensor:
        threading.Thread(target=fleet.servers[A].stop).start()
        may_end.wait(10.0)
        return local.compute(call)

    fleet.start(A, compute=stop_and_compute)
    fleet.start(B)
    lost: list[str] = []
    with directory_over(local, fleet.roster(), on_lost=lost.append) as directory:
        assert_same(directory, local, call_of())
        may_end.set()
        stats = directory.stats()
        assert stats.failovers == 1 and stats.remote_rows > 0 and stats.local_rows > 0
        assert stats.failovers_by_kind["lost"] == 1
        assert lost == [A]
        assert len(logged) == 1 and "connection to experts-0 lost" in logged[0]


def test_all_actors_lost_leave_the_local_worker(fleet: Fleet, local: ExpertWorker) -> None:
    for name in NAMES:
        fleet.start(name)
    with directory_over(local, fleet.roster()) as directory:
        for server in fleet.servers.values():
            server.stop()
        assert_same(directory, local, call_of())


def test_late_actor_is_replaced_and_then_left_alone_for_a_while(fleet: Fleet, local: ExpertWorker) -> None:
    """Its heartbeats come, so it is connected again at once; asking it again would cost the deadline again."""
    may_end = threading.Event()

    def wait_and_compute(call: ExpertCall) -> torch.Tensor:
        may_end.wait(30.0)
        return local.compute(call)

    fleet.start(A, compute=wait_and_compute)
    lost: list[str] = []
    roster = fleet.roster()
    quick = DirectoryOptions(call_timeout_s=0.3)
    with directory_over(local, roster, options=quick, on_lost=lost.append) as directory:
        assert_same(directory, local, call_of())
        assert directory.stats().failovers_by_kind["late"] == 1
        assert lost == [A]
        directory.update(roster)
        assert directory.connected() == {A}
        assert_same(directory, local, call_of())
        assert directory.stats().failovers == 1
        may_end.set()


@pytest.mark.parametrize("error", [NotInGroup("model/0/0"), RuntimeError("a bug")])
def test_error_answer_is_computed_here_and_the_actor_is_not_reported_lost(
    error: Exception, fleet: Fleet, local: ExpertWorker
) -> None:
    fleet.start(A, compute=fail_with(error))
    fleet.start(B)
    lost: list[str] = []
    with directory_over(local, fleet.roster(), on_lost=lost.append) as directory:
        for seed in (0, 2, 1):
            assert_same(directory, local, call_of(seed))
        assert directory.stats().failovers_by_kind["error"] == 2, (
            "once a layer: then it is left alone for a while"
        )
        assert directory.connected() == {A, B}
    assert lost == []


# Replicas and survivors


def test_replica_takes_over_without_a_local_row(fleet: Fleet, local: ExpertWorker) -> None:
    for name in (A, B):
        fleet.start(name)
    with directory_over(local, fleet.roster(owned_by(A, B))) as directory:
        assert_same(directory, local, call_of())
        fleet.servers[A].stop()
        for seed in range(4):
            assert_same(directory, local, call_of(seed))
        assert directory.stats().local_rows == 0


def test_call_under_way_is_sent_to_the_replica_when_its_actor_dies(fleet: Fleet, local: ExpertWorker) -> None:
    may_end = threading.Event()

    def stop_and_wait(call: ExpertCall) -> torch.Tensor:
        threading.Thread(target=fleet.servers[A].stop).start()
        may_end.wait(10.0)
        return local.compute(call)

    fleet.start(A, compute=stop_and_wait)
    fleet.start(B)
    with directory_over(local, fleet.roster(owned_by(A, B))) as directory:
        assert_same(directory, local, call_of(experts=(0,)))
        may_end.set()
        stats = directory.stats()
        assert (stats.local_rows, stats.failovers) == (0, 1)


def test_survivor_with_a_copy_comes_before_the_local_worker(
    fleet: Fleet, local: ExpertWorker, fleet_store: ExpertStore
) -> None:
    """It computes experts outside of its group, and its own as before."""
    own = [key for key in ALL_KEYS if key.expert % 2]
    others = [key for key in ALL_KEYS if key not in own]
    survivor = make_worker(fleet_store, group=own, budget_bytes=60_000, has_guests=True)
    fleet.start(A)
    fleet.start(B, compute=survivor.compute)
    owners = dict.fromkeys(others, (A,)) | dict.fromkeys(own, (B,))
    roster = fleet.roster(owners, fallbacks=dict.fromkeys(others, (B,)))
    with directory_over(local, roster) as directory:
        fleet.servers[A].stop()
        for seed in range(4):
            assert_same(directory, local, call_of(seed))
        assert directory.stats().local_rows == 0
        fleet.servers[B].stop()
        assert_same(directory, local, call_of())
        assert directory.stats().local_rows > 0
    survivor.close()


def test_survivor_that_cannot_after_all_is_passed_over(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(A)
    fleet.start(B, compute=fail_with(NotInGroup("model/0/0")))
    roster = fleet.roster(owned_by(A), fallbacks=owned_by(B))
    with directory_over(local, roster) as directory:
        fleet.servers[A].stop()
        assert eventually(lambda: A not in directory.connected())
        assert_same(directory, local, call_of())
        assert directory.stats().failovers_by_kind["error"] == 1


def test_same_numerics_class_is_preferred_and_another_one_is_counted(
    fleet: Fleet, local: ExpertWorker, fleet_store: ExpertStore
) -> None:
    fleet.start(A, numerics_class="other")
    fleet.start(B)
    nothing = make_worker(fleet_store, group=[])
    with directory_over(nothing, fleet.roster(owned_by(A, B))) as directory:
        for seed in range(4):
            assert_same(directory, local, call_of(seed))
        assert directory.foreign_rows == 0, "the second of two owners, since it is of this process's class"
        fleet.servers[B].stop()
        assert eventually(lambda: B not in directory.connected())
        assert_same(directory, local, call_of())
        assert directory.foreign_rows == directory.stats().foreign_rows == call_of().num_rows
    nothing.close()


# Nobody left


@pytest.fixture
def unable(fleet_store: ExpertStore) -> Iterator[ExpertWorker]:
    """A worker in the router's process that can compute expert 0 only."""
    worker = make_worker(fleet_store, group=[key for key in ALL_KEYS if not key.expert])
    yield worker
    worker.close()


def test_call_that_nobody_can_compute_waits_for_the_replacement(
    fleet: Fleet, local: ExpertWorker, unable: ExpertWorker
) -> None:
    fleet.start(A).stop()
    rows: list[torch.Tensor] = []
    with directory_over(unable, fleet.roster()) as directory:
        thread = threading.Thread(target=lambda: rows.append(directory.run(call_of())), daemon=True)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        fleet.start(A, 2)
        directory.update(fleet.roster())
        thread.join(20.0)
        assert torch.equal(rows[0], local.compute(call_of()))


def test_replacement_that_does_not_come_ends_in_an_error_that_names_the_expert(
    fleet: Fleet, unable: ExpertWorker
) -> None:
    fleet.start(A).stop()
    hasty = DirectoryOptions(replacement_wait_s=0.2)
    with directory_over(unable, fleet.roster(), options=hasty) as directory:
        with pytest.raises(ExpertUnavailable) as caught:
            directory.run(call_of(experts=(1, 2)))
        assert str(caught.value).startswith("nobody could compute model, layer 0, experts 1, 2, for 0 s: ")


def test_expert_that_belongs_to_this_process_is_not_waited_for(fleet: Fleet, unable: ExpertWorker) -> None:
    fleet.start(A)
    with directory_over(unable, fleet.roster({})) as directory, pytest.raises(NotInGroup):
        directory.run(call_of())


def test_closing_ends_the_wait_for_a_replacement(fleet: Fleet, unable: ExpertWorker) -> None:
    fleet.start(A).stop()
    ends: list[BaseException] = []
    with directory_over(unable, fleet.roster()) as directory:

        def run() -> None:
            try:
                directory.run(call_of())
            except ExpertUnavailable as error:
                ends.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(0.1)
        directory.close()
        thread.join(20.0)
    assert len(ends) == 1


# Answers of an earlier life


def test_reply_of_an_old_incarnation_is_never_taken(fleet: Fleet, local: ExpertWorker) -> None:
    """The old life answers zeros, late; the new one is already in the roster."""
    is_computing, may_end = threading.Event(), threading.Event()

    def zeros_late(call: ExpertCall) -> torch.Tensor:
        is_computing.set()
        may_end.wait(10.0)
        return torch.zeros(call.num_rows, WIDTH)

    fleet.start(A, 1, compute=zeros_late)
    old = fleet.servers.pop(A)
    lost: list[str] = []
    with directory_over(local, fleet.roster(), on_lost=lost.append) as directory:
        rows: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: rows.append(directory.run(call_of())), daemon=True)
        thread.start()
        assert is_computing.wait(5.0)
        fleet.start(A, 2)
        directory.update(fleet.roster())
        may_end.set()
        thread.join(20.0)
        assert torch.equal(rows[0], local.compute(call_of()))
        for seed in range(3):
            assert_same(directory, local, call_of(seed))
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

    with ExitStack() as stack:
        actor = stack.enter_context(FakeActor(answer_as_before, info=encode_info(info_of(local), 16)))
        roster = Roster(1, {A: endpoint_of(actor.port)}, owned_by(A))
        directory = stack.enter_context(directory_over(local, roster))
        assert_same(directory, local, call_of(0, experts=(0, 1)))
        assert directory.stats().failovers == 1


# Whatever happens


@pytest.mark.parametrize("seed", range(6))
def test_random_failures_of_three_actors_never_give_a_wrong_row(
    seed: int, fleet: Fleet, local: ExpertWorker
) -> None:
    """Actors with replicas die, come back, fail, and answer with values that are not finite, between calls and within
    them; owners change. Every row is that of the local worker."""
    chance = random.Random(seed)
    trouble = ["none"] * len(NAMES)

    def compute_as(number: int) -> Compute:
        def compute(call: ExpertCall) -> torch.Tensor:
            what = trouble[number]
            if what == "dies":
                trouble[number] = "none"
                threading.Thread(target=fleet.servers[NAMES[number]].stop).start()
            if what == "fails":
                raise RuntimeError("a bug")
            rows_RD = local.compute(call)
            if what == "not finite":
                rows_RD[chance.randrange(call.num_rows), chance.randrange(WIDTH)] = torch.nan
            return rows_RD

        return compute

    def random_owners() -> Owners:
        return {key: tuple(chance.sample(NAMES, chance.randint(1, 3))) for key in ALL_KEYS}

    for number, name in enumerate(NAMES):
        fleet.start(name, compute=compute_as(number))
    incarnation = 1
    options = DirectoryOptions(audit_share=0.1, audit_seed=seed)
    with directory_over(local, fleet.roster(random_owners()), options=options) as directory:
        for step in range(60):
            assert_same(directory, local, call_of(100 * seed + step))
            number = chance.randrange(len(NAMES))
            trouble[number] = chance.choice(("none", "none", "dies", "fails", "not finite"))
            if chance.random() < 0.3:
                incarnation += 1
                trouble[number] = "none"
                fleet.start(NAMES[number], incarnation, compute=compute_as(number))
            if chance.random() < 0.3:
                directory.update(fleet.roster(random_owners()))
        stats = directory.stats()
        assert stats.failovers > 0 and stats.remote_rows > 0
