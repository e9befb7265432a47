"""Actors that answer with wrong values: not finite ones are found at once, finite ones by an audit."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from experts.asking import are_finite
from experts.call import ExpertCall
from experts.remote_directory import DirectoryOptions
from experts.server import Compute
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from tests.experts.fleet import (
    NAMES,
    Fleet,
    assert_same,
    call_of,
    directory_over,
    owned_by,
)
from tests.experts.wire_peers import eventually

pytestmark = pytest.mark.usefixtures("nothing_stays")

A, B, C = NAMES
Report = tuple[str, int, str]


def spoil(local: ExpertWorker, change: Callable[[torch.Tensor], object]) -> Compute:
    """Right rows, changed."""

    def compute(call: ExpertCall) -> torch.Tensor:
        rows_RD = local.compute(call)
        change(rows_RD)
        return rows_RD

    return compute


def put(value: float) -> Callable[[torch.Tensor], object]:
    """One value of the last row."""
    return lambda rows_RD: rows_RD[-1, 3].fill_(value)


def _collect(reports: list[Report]) -> Callable[[str, int, str], None]:
    return lambda *report: reports.append(report)


# Values that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_value_that_is_not_finite_is_computed_elsewhere_and_its_actor_asked_no_more(
    value: float, fleet: Fleet, local: ExpertWorker
) -> None:
    fleet.start(A, 7, compute=spoil(local, put(value)))
    fleet.start(B)
    bad: list[Report] = []
    lost: list[str] = []
    roster = fleet.roster(owned_by(A, B))
    with directory_over(local, roster, on_bad=_collect(bad), on_lost=lost.append) as directory:
        for seed in range(4):
            assert_same(directory, local, call_of(seed))
        directory.update(roster)
        assert directory.connected() == {B}
        stats = directory.stats()
        assert stats.failovers_by_kind["not finite"] == stats.failovers == 1
        assert (stats.quarantined, stats.num_quarantined) == ((f"{A}/7",), 1)
        assert [(name, incarnation) for name, incarnation, _ in bad] == [(A, 7)] and lost == []
        fleet.start(A, 8)
        directory.update(fleet.roster(owned_by(A, B)))
        assert directory.connected() == {A, B}, "its next life is another actor"


def test_infinities_of_both_signs_do_not_cancel(fleet: Fleet, local: ExpertWorker) -> None:
    def change(rows_RD: torch.Tensor) -> None:
        rows_RD[0, 0], rows_RD[0, 1] = torch.inf, -torch.inf

    fleet.start(A, compute=spoil(local, change))
    with directory_over(local, fleet.roster()) as directory:
        assert_same(directory, local, call_of())


def test_value_that_two_actors_agree_on_is_the_model_s_own(fleet: Fleet, local: ExpertWorker) -> None:
    overflow = spoil(local, put(torch.inf))
    fleet.start(A, compute=overflow)
    fleet.start(B, compute=overflow)
    bad: list[Report] = []
    with directory_over(local, fleet.roster(owned_by(A, B)), on_bad=_collect(bad)) as directory:
        rows_RD = directory.run(call_of(experts=(0,)))
        assert torch.equal(rows_RD, overflow(call_of(experts=(0,))))
        assert directory.stats().failovers_by_kind["not finite"] == 1
        assert directory.connected() == {A, B} and bad == []


def test_activations_that_are_not_finite_accuse_nobody(fleet: Fleet, local: ExpertWorker) -> None:
    fleet.start(A)
    call = call_of()
    call.tokens_TD[0] = torch.nan
    with directory_over(local, fleet.roster()) as directory:
        assert torch.equal(directory.run(call).isnan(), local.compute(call).isnan())
        assert directory.stats().failovers == 0


def test_very_large_values_are_finite() -> None:
    most = torch.finfo(torch.float32).max
    assert are_finite(torch.full((8, 8), most))
    assert not are_finite(torch.tensor([most, torch.inf]))
    assert are_finite(torch.full((4096, 8), 60_000.0, dtype=torch.float16))
    assert not are_finite(torch.tensor([1.0, torch.nan], dtype=torch.bfloat16))


# Values that are wrong


@pytest.mark.parametrize("seed", range(3))
def test_liar_is_found_within_the_promised_number_of_calls(
    seed: int, fleet: Fleet, local: ExpertWorker
) -> None:
    """4.6 / r calls, in 99 of 100 cases. The lie is one bit of one value."""
    share = 0.05
    lie = spoil(local, lambda rows: rows.view(torch.int32)[-1, 3].bitwise_xor_(1))
    fleet.start(A, 3, compute=lie)
    fleet.start(B)
    fleet.start(C)
    bad: list[Report] = []
    options = DirectoryOptions(audit_share=share, audit_seed=seed)
    roster = fleet.roster(owned_by(A))
    with directory_over(local, roster, options=options, on_bad=_collect(bad)) as directory:
        calls = 0
        while A in directory.connected() and calls < 4.6 / share:
            directory.run(call_of(calls, experts=(0, 1)))
            directory.auditor.drain()
            calls += 1
        assert A not in directory.connected()
        assert [(name, incarnation) for name, incarnation, _ in bad] == [(A, 3)]
        stats = directory.stats()
        assert stats.audits.disagreed == 1 and stats.quarantined == (f"{A}/3",)
        for number in range(4):
            assert_same(directory, local, call_of(number))


def test_honest_actors_are_never_accused(fleet: Fleet, local: ExpertWorker) -> None:
    for name in NAMES:
        fleet.start(name)
    bad: list[Report] = []
    options = DirectoryOptions(audit_share=1.0)
    with directory_over(
        local, fleet.roster(owned_by(*NAMES)), options=options, on_bad=_collect(bad)
    ) as directory:
        for seed in range(20):
            assert_same(directory, local, call_of(seed))
            directory.auditor.drain()
        stats = directory.stats()
        assert stats.audits.done >= 20 and stats.audits.disagreed == 0 and bad == []
        rows = sum(call_of(seed).num_rows for seed in range(20))
        assert stats.remote_rows + stats.local_rows == rows, "what audits compute is not counted"


def test_lying_replica_that_gives_the_second_opinion_is_the_one_that_is_found(
    fleet: Fleet, local: ExpertWorker
) -> None:
    """The owner is honest and audited; its replica lies; a third opinion decides."""
    fleet.start(A)
    fleet.start(B, compute=spoil(local, put(0.25)))
    bad: list[Report] = []
    options = DirectoryOptions(audit_share=1.0)
    owners = owned_by(A, B)
    with directory_over(local, fleet.roster(owners), options=options, on_bad=_collect(bad)) as directory:
        directory.run(call_of(experts=(0,)))
        directory.auditor.drain()
        assert directory.connected() == {A}
        assert [name for name, _, _ in bad] == [B]


def test_other_class_is_audited_within_its_tolerance(
    fleet: Fleet, local: ExpertWorker, fleet_store: ExpertStore
) -> None:
    def rounded(rows_RD: torch.Tensor) -> None:
        rows_RD.mul_(1 + 1e-6)

    fleet.start(A, compute=spoil(local, rounded), numerics_class="other")
    options = DirectoryOptions(audit_share=1.0)
    with directory_over(local, fleet.roster(), options=options) as directory:
        for seed in range(5):
            directory.run(call_of(seed))
            directory.auditor.drain()
        stats = directory.stats()
        assert (stats.audits.done, stats.audits.disagreed) == (5, 0)
        assert stats.foreign_rows == stats.remote_rows > 0


def test_audits_do_not_hold_up_calls(fleet: Fleet, local: ExpertWorker, fleet_store: ExpertStore) -> None:
    """The second opinion never comes; calls go on, and closing does not wait for it for ever."""
    is_asked, may_end = threading.Event(), threading.Event()

    def hang(call: ExpertCall) -> torch.Tensor:
        is_asked.set()
        may_end.wait(30.0)
        return local.compute(call)

    fleet.start(A)
    fleet.start(B, compute=hang)
    owners = owned_by(A)
    options = DirectoryOptions(audit_share=1.0)
    roster = fleet.roster(owners, fallbacks=owned_by(B))
    with directory_over(local, roster, options=options) as directory:
        for seed in range(10):
            assert_same(directory, local, call_of(seed))
        assert is_asked.wait(10.0)
        assert eventually(lambda: directory.stats().audits.owed >= 4)
    may_end.set()
