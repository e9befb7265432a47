"""Calls that the C source answers are those that Python would have answered: the same rows, the same accounts."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.desk import USES_ROOM, Desk
from experts.errors import PeerLost
from experts.frame import HEADER_BYTES, Agreement, encode_call
from experts.handshake import ServiceInfo
from experts.server import ExpertServer
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from tests.experts.conftest import NEEDS_PLANE
from tests.experts.fleet import ALL_KEYS, KERNEL, LAYERS, WIDTH, call_of, info_of, make_worker
from tests.experts.wire_peers import INCARNATION, SECRET, RawRouter, ask, connecting, eventually

pytestmark = [
    pytest.mark.usefixtures("nothing_stays"),
    NEEDS_PLANE,
    pytest.mark.skipif(KERNEL.product != "native", reason="needs our own products"),
]
SPINNING = TransportLimits(max_rows_per_frame=64, spin_s=0.02)


@contextmanager
def served(worker: ExpertWorker, limits: TransportLimits = SPINNING) -> Iterator[ExpertServer]:
    server = ExpertServer(
        worker.compute,
        info_of(worker),
        secret=SECRET,
        incarnation=INCARNATION,
        limits=limits,
        desk=worker.desk,
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()
        worker.close()


def desk_of(worker: ExpertWorker) -> Desk:
    assert worker.desk is not None
    return worker.desk


def calls(count: int) -> list[ExpertCall]:
    chance = random.Random(5)
    return [call_of(seed, 3, tuple(sorted(chance.sample(range(8), 3)))) for seed in range(count)]


def told(worker: ExpertWorker) -> dict[str, Any]:
    """All that a worker says of itself."""
    stats = worker.stats
    return {
        "stats": {name: value for name, value in vars(stats).items() if name != "behind"},
        "steps": dict(worker._steps),
        "now": worker._now,
        "resident": [worker.resident("model", layer) for layer in LAYERS],
        "bytes": worker.resident_bytes,
    }


@pytest.mark.parametrize("share", [None, 1.0, 0.5], ids=["no bound", "bound of all", "half"])
def test_rows_and_accounts_are_those_without_a_desk(fleet_store: ExpertStore, share: float | None) -> None:
    """Where the budget is too small for all, a shadow cache looks on and there is no desk."""
    whole = make_worker(fleet_store)
    budget = None if share is None else int(share * whole.group_bytes)
    worker = make_worker(fleet_store, budget_bytes=budget, is_served=True)
    plain = make_worker(fleet_store, budget_bytes=budget)
    assert (worker.desk is None) == (share == 0.5)
    with served(worker) as server, connecting(server.port, limits=SPINNING) as link:
        for number, call in enumerate(calls(40)):
            assert torch.equal(ask(link, call), plain.compute(call))
            if share == 1.0 and number == 20:
                for each in (worker, plain):
                    each.set_budget(int(0.6 * whole.group_bytes))
        assert told(worker) == told(plain)
    plain.close()
    whole.close()


def test_calls_for_experts_at_hand_do_not_reach_python(
    fleet_store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    answered: list[ExpertCall] = []
    monkeypatch.setattr(worker, "compute", lambda call: answered.append(call) or make_rows(worker, call))
    with served(worker) as server, connecting(server.port, limits=SPINNING) as link:
        expected = make_worker(fleet_store)
        for call in calls(10):
            assert torch.equal(ask(link, call), expected.compute(call))
        assert not answered
        assert worker.stats.calls == 10
        expected.close()


def make_rows(worker: ExpertWorker, call: ExpertCall) -> torch.Tensor:
    return ExpertWorker.compute(worker, call)


def test_guest_is_computed_by_python_and_leaves_the_desk_with_its_memory(fleet_store: ExpertStore) -> None:
    group = [key for key in ALL_KEYS if key.expert < 4]
    worker = make_worker(fleet_store, group=group, has_guests=True, is_served=True)
    worker.load_all()
    plain = make_worker(fleet_store)
    with served(worker) as server, connecting(server.port, limits=SPINNING) as link:
        for experts in ((0, 3), (3, 5), (0, 1, 7), (5,), (2,)):
            call = call_of(2, 3, experts)
            assert torch.equal(ask(link, call), plain.compute(call))
            assert worker.resident("model", call.layer) == {0, 1, 2, 3}
    plain.close()


def test_full_list_of_uses_is_counted_before_the_next_call(
    fleet_store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.desk.USES_ROOM", 14)
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    with served(worker) as server, connecting(server.port, limits=SPINNING) as link:
        for call in calls(9):
            ask(link, call)
        assert worker._stats.calls == 9 - 9 % 3, (
            "two of three were written down, and the third one counted all"
        )
        assert worker.stats.calls == 9
    assert USES_ROOM > 14


def test_budget_that_falls_while_calls_come_changes_no_row(fleet_store: ExpertStore) -> None:
    """Two routers ask, and memory is taken away from under them again and again."""
    plain = make_worker(fleet_store)
    whole = plain.group_bytes
    worker = make_worker(fleet_store, budget_bytes=whole, is_served=True)
    worker.load_all()
    asked = calls(60)
    expected = [plain.compute(call) for call in asked]
    wrong: list[int] = []

    def route(port: int, shift: int) -> None:
        with connecting(port, limits=SPINNING) as link:
            for number in range(3 * len(asked)):
                index = (number * 7 + shift) % len(asked)
                if not torch.equal(ask(link, asked[index]), expected[index]):
                    wrong.append(index)

    with served(worker) as server:
        routers = [threading.Thread(target=route, args=(server.port, shift)) for shift in (0, 3)]
        for router in routers:
            router.start()
        chance = random.Random(3)
        while any(router.is_alive() for router in routers):
            worker.set_budget(int(chance.uniform(0.2, 1.0) * whole))
            assert worker.cache.allocated_bytes <= worker.cache.budget_bytes
            time.sleep(0.001)
        for router in routers:
            router.join()
        assert not wrong
        stats = worker.stats
        assert stats.calls == 6 * len(asked)
        uses = 2 * 3 * sum(len(call.experts) for call in asked)
        assert stats.hits + stats.misses == uses + len(ALL_KEYS), "reading all of them counts too"
    plain.close()


def test_reading_ahead_ends_the_desk_s_work(fleet_store: ExpertStore) -> None:
    """Uses of what was guessed are counted as they come."""
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    worker.prefetch("model", LAYERS[0], [1])
    with served(worker) as server, connecting(server.port, limits=SPINNING) as link:
        for number in range(3):
            ask(link, call_of(0))
            assert worker._stats.calls == number + 1


def test_desk_says_how_long_there_was_work(fleet_store: ExpertStore) -> None:
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    desk = desk_of(worker)
    with served(worker) as server, connecting(server.port, limits=SPINNING) as link:
        began = time.perf_counter()
        for call in calls(10):
            ask(link, call)
        assert eventually(lambda: desk.num_active == 0)
        assert 0.0 < desk.busy_s < time.perf_counter() - began
        desk.begin_work()
        desk.begin_work()
        assert desk.num_active == 2
        desk.end_work()
        desk.end_work()


def test_desk_for_other_rows_is_refused(fleet_store: ExpertStore) -> None:
    worker = make_worker(fleet_store, is_served=True)
    info = ServiceInfo(WIDTH, torch.bfloat16, worker.numerics_class, ("model",))
    with pytest.raises(ValueError, match="does not serve"):
        ExpertServer(worker.compute, info, secret=SECRET, incarnation=1, desk=worker.desk)
    worker.close()


def test_no_desk_where_others_compute(fleet_store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.desk.plane", lambda: None)
    worker = make_worker(fleet_store, is_served=True)
    assert worker.desk is None
    assert worker.compute(call_of()).shape == (call_of().num_rows, WIDTH)
    worker.close()


def test_expert_of_other_dimensions_is_never_shown(fleet_store: ExpertStore) -> None:
    worker = make_worker(fleet_store)
    worker.load_all()
    shown = Desk.of(KERNEL, torch.float32, {"model": WIDTH}, ALL_KEYS)
    narrow = Desk.of(KERNEL, torch.float32, {"model": WIDTH // 2}, ALL_KEYS)
    assert shown is not None and narrow is not None
    key = ALL_KEYS[3]
    for desk in (shown, narrow):
        desk.show(key, worker.cache.weights[key])
    assert any(shown._experts["model", key.layer]) and not any(narrow._experts["model", key.layer])
    shown.close()
    shown.show(key, worker.cache.weights[key])
    assert not any(shown._experts["model", key.layer])
    assert Desk.of(KERNEL, torch.float32, {"model": WIDTH, "talker": 8}, ALL_KEYS) is None
    worker.close()


# Peers that die or dawdle in the middle of a call that the C source reads


@contextmanager
def raw_router(server: ExpertServer) -> Iterator[RawRouter]:
    with RawRouter(server.port) as router:
        router.introduce()
        router.hear()
        yield router


def frame_of(call: ExpertCall, deadline_us: int = 5_000_000, sequence: int = 1) -> bytes:
    agreed = Agreement(INCARNATION, WIDTH, torch.float32, ("model",), 64)
    head = encode_call(call, agreed, sequence, deadline_us)
    return head + call.tokens_TD.numpy().tobytes()


def test_frame_cut_anywhere_is_answered(fleet_store: ExpertStore) -> None:
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    call = call_of(1)
    frame, expected = frame_of(call), worker.compute(call)
    with served(worker) as server:
        for cut in (1, 63, 64, 65, 90, 200, len(frame) - 1):
            with raw_router(server) as router:
                router.send(frame[:cut])
                time.sleep(0.02)
                router.send(frame[cut:])
                _, body = router.hear()
                assert body == expected.numpy().tobytes()


def test_call_that_comes_byte_by_byte_is_given_up_at_its_deadline(
    fleet_store: ExpertStore, warnings: list[str]
) -> None:
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    frame = frame_of(call_of(1), deadline_us=100_000)
    with served(worker) as server, raw_router(server) as router:
        router.send(frame[:HEADER_BYTES])
        for byte in frame[HEADER_BYTES : HEADER_BYTES + 60]:
            router.send(bytes((byte,)))
            time.sleep(0.005)
        assert router.is_closed_within(5.0)
        assert worker.stats.calls == 0
    assert any("deadline" in line for line in warnings)


@pytest.mark.parametrize("cut", [10, 64, 100, -1])
def test_router_that_leaves_in_the_middle_of_a_call_is_one_line(
    fleet_store: ExpertStore, warnings: list[str], cut: int
) -> None:
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    with served(worker) as server:
        with raw_router(server) as router:
            router.send(frame_of(call_of(1))[:cut])
            router.socket.shutdown(socket.SHUT_WR)
            assert router.is_closed_within(5.0)
        assert eventually(lambda: warnings != [])
        assert "in the middle of a frame" in warnings[0]
        assert worker.stats.calls == 0


def test_server_stops_while_its_threads_look_for_bytes(fleet_store: ExpertStore) -> None:
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    limits = TransportLimits(max_rows_per_frame=64, spin_s=30.0)
    with served(worker, limits) as server, connecting(server.port, limits=limits) as link:
        ask(link, call_of(1))
        began = time.monotonic()
        server.stop()
        with pytest.raises(PeerLost):
            ask(link, call_of(1))
        assert time.monotonic() - began < 5.0


def test_late_answer_closes_the_connection(fleet_store: ExpertStore, warnings: list[str]) -> None:
    """The worker's lock is held for longer than the call may take."""
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    with served(worker) as server, raw_router(server) as router:
        with worker._lock:
            router.send(frame_of(call_of(1), deadline_us=50_000))
            time.sleep(0.2)
        assert router.is_closed_within(5.0)
    assert any("not done by its deadline" in line for line in warnings)


def test_heartbeats_come_while_a_call_waits_for_the_worker(fleet_store: ExpertStore) -> None:
    worker = make_worker(fleet_store, is_served=True)
    worker.load_all()
    limits = TransportLimits(max_rows_per_frame=64, heartbeat_interval_s=0.05)
    with served(worker, limits) as server, connecting(server.port, limits=limits) as link:
        with worker._lock:
            link.start(call_of(1), timeout_s=20.0)
            time.sleep(0.6)  # three times what a silent peer may take
        assert link.finish().shape == (call_of(1).num_rows, WIDTH)
        assert link.is_open
