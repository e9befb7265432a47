"""Connections follow the roster: who is connected, who is refused, who is let go."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from experts.handshake import encode_info
from experts.roster import Roster
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey
from tests.experts.fleet import (
    HASTY,
    KERNEL,
    NAMES,
    WIDTH,
    Fleet,
    assert_same,
    call_of,
    directory_over,
    info_of,
)
from tests.experts.wire_peers import (
    SLACK_S,
    STEADY,
    FakeActor,
    endpoint_of,
    eventually,
    heartbeat,
)

pytestmark = pytest.mark.usefixtures("nothing_stays")


def test_restarted_actor_is_used_again(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(NAMES[0])
    with directory_over(local, fleet.roster()) as directory:
        for incarnation in (2, 3, 4):
            assert_same(directory, local, call_of(incarnation))
            remote_rows = directory.stats().remote_rows
            fleet.start(NAMES[0], incarnation)
            assert_same(directory, local, call_of(incarnation))
            directory.update(fleet.roster())
            assert_same(directory, local, call_of(incarnation))
            assert directory.stats().remote_rows == remote_rows + call_of(incarnation).num_rows
        assert directory.stats().local_rows > 0


def test_actor_that_lost_its_connection_is_reached_again_by_the_same_roster(
    fleet: Fleet, local: ExpertWorker
) -> None:
    server = fleet.start(NAMES[0])
    roster = fleet.roster()
    lost = threading.Event()
    with directory_over(local, roster, STEADY, on_lost=lambda name: lost.set()) as directory:
        for channel in list(server._listener._proven):
            channel.end("cut")
        assert lost.wait(20.0)
        assert directory.connected() == frozenset()
        directory.update(roster)
        assert_same(directory, local, call_of())
        assert directory.stats().local_rows == 0


def test_older_roster_is_ignored(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(NAMES[0])
    old = fleet.roster()
    fleet.start(NAMES[1])
    with directory_over(local, fleet.roster()) as directory:
        directory.update(old)
        directory.update(replace(old, endpoints={}))
        assert directory.connected() == {NAMES[0], NAMES[1]}


def test_actor_that_left_the_roster_is_let_go_and_not_reported_lost(
    fleet: Fleet, local: ExpertWorker
) -> None:
    server = fleet.start(NAMES[0])
    lost: list[str] = []
    with directory_over(local, fleet.roster(), HASTY, on_lost=lost.append) as directory:
        directory.update(Roster(100, {}, {}))
        assert directory.connected() == frozenset()
        assert eventually(lambda: server.num_connections == 0)
        assert_same(directory, local, call_of())
        time.sleep(3 * HASTY.heartbeat_interval_s)
    assert lost == []


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
    with directory_over(local, fleet.roster()) as directory:
        assert directory.connected() == {NAMES[1]}
        for seed in range(3):
            assert_same(directory, local, call_of(seed))
        assert directory.stats().failovers == 0
        directory.update(fleet.roster())
        assert len(logged) == 1 and "experts-0 is refused" in logged[0] and message in logged[0]
        assert eventually(lambda: fleet.servers[NAMES[0]].num_connections == 0)
        fleet.start(NAMES[0], 2)
        directory.update(fleet.roster())
        assert directory.connected() == {NAMES[0], NAMES[1]}


def test_actor_that_is_given_a_component_it_does_not_have_is_let_go(
    fleet: Fleet, fleet_store: ExpertStore, logged: list[str]
) -> None:
    both = ExpertWorker(fleet_store, KERNEL, torch.float32, widths={"model": WIDTH, "talker": WIDTH})
    fleet.start(NAMES[0])
    with directory_over(both, fleet.roster()) as directory:
        assert directory.connected() == {NAMES[0]}
        directory.update(fleet.roster({ExpertKey("talker", 0, 0): (NAMES[0],)}))
        assert directory.connected() == frozenset()
        assert len(logged) == 1 and "has no component 'talker'" in logged[0]


def test_actor_of_another_numerics_class_is_used_with_a_warning(
    fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    fleet.start(NAMES[0], numerics_class="other")
    with directory_over(local, fleet.roster()) as directory:
        assert directory.connected() == {NAMES[0]}
    assert len(logged) == 1 and "another numerics class (other" in logged[0]


def test_actor_with_quantised_experts_is_refused_by_a_router_without(
    fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    fleet.start(NAMES[0], numerics_class=local.numerics_class + "/int4-g32/pack-1")
    with directory_over(local, fleet.roster()) as directory:
        assert directory.connected() == frozenset()
    assert len(logged) == 1 and "has experts in int4-g32, here in full precision" in logged[0]


def test_actor_that_cannot_be_reached_is_left_out_with_a_warning(
    fleet: Fleet, local: ExpertWorker, logged: list[str]
) -> None:
    fleet.start(NAMES[0]).stop()
    fleet.start(NAMES[1])
    with directory_over(local, fleet.roster()) as directory:
        assert directory.connected() == {NAMES[1]}
        assert_same(directory, local, call_of())
    assert len(logged) == 1 and "cannot reach expert actor experts-0" in logged[0]


def test_connection_is_tended_while_others_are_slow_to_come(fleet: Fleet, local: ExpertWorker) -> None:
    """A new connection used to get no heartbeat until the whole roster was connected, and was closed as idle."""
    limits = replace(STEADY, handshake_timeout_s=2.0)
    fleet.start(NAMES[0], limits=limits)
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        directory = stack.enter_context(directory_over(local, Roster(0, {}, {}), limits))
        fleet.announce(endpoint_of(listener.getsockname()[1], name=NAMES[1]))
        directory.update(fleet.roster())
        assert directory.connected() == {NAMES[0]}
        assert_same(directory, local, call_of())
        assert directory.stats().failovers == 0


def test_silent_actor_is_noticed_while_nobody_calls(local: ExpertWorker) -> None:
    def hang(connected: socket.socket) -> None:
        while connected.recv(4096):
            pass

    lost = threading.Event()
    with FakeActor(hang, info=encode_info(info_of(local), 16)) as actor:
        roster = Roster(1, {NAMES[0]: endpoint_of(actor.port)}, {})
        started_s = time.monotonic()
        with directory_over(local, roster, HASTY, on_lost=lambda name: lost.set()) as directory:
            assert directory.connected() == {NAMES[0]}
            assert lost.wait(HASTY.silence_s + SLACK_S)
            assert time.monotonic() - started_s >= 0.9 * HASTY.silence_s
            assert directory.connected() == frozenset()


def test_heartbeats_of_a_fake_actor_keep_it_connected(local: ExpertWorker) -> None:
    def beat(connected: socket.socket) -> None:
        while not actor.is_done.wait(0.03):
            connected.sendall(heartbeat())

    lost: list[str] = []
    with FakeActor(beat, info=encode_info(info_of(local), 16)) as actor:
        roster = Roster(1, {NAMES[0]: endpoint_of(actor.port)}, {})
        with directory_over(local, roster, STEADY, on_lost=lost.append) as directory:
            time.sleep(2 * STEADY.silence_s)
            assert directory.connected() == {NAMES[0]}
    assert lost == []
