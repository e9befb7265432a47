"""Router's and actor's end together: calls, their answers, and many of them at once."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.connection import ExpertConnection
from experts.errors import (
    BudgetTooSmall,
    NotInGroup,
    PeerLost,
    RemoteExpertError,
    UnknownExpert,
)
from experts.frame import (
    ErrorCode,
)
from experts.server import ExpertServer
from tests.experts.wire_peers import (
    INFO,
    MAX_ROWS,
    WIDTH,
    ask,
    connecting,
    eventually,
    make_call,
    rows_of,
    serving,
)

pytestmark = pytest.mark.usefixtures("nothing_stays", "each_reader")


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
            link.start(make_call(num_rows)._replace(**change), timeout_s=5.0)
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
