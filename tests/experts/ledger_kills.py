"""Owners of a trust ledger that are killed, in processes of their own; see `test_ledger_kills`.

Report n is the same in every run, so the state after n reports is known: what is found after a kill must be one of
them, and not an earlier one than was acknowledged.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from experts.errors import LedgerUnusable
from experts.trust import (
    ASPECTS,
    TrustReport,
    TrustSettings,
    TrustTable,
    empty_table,
    merged,
    moved,
    observe,
    observe_buckets,
)
from experts.trust_ledger import TrustIdentity, TrustLedger

IDENTITY = TrustIdentity("ab" * 32, "bfloat16", "model", (0, 2), 16)
SETTINGS = TrustSettings()
TOKENS_A_REPORT = 100
DEADLINE_S = 60.0
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.experts.ledger_kills"])


def report_number(number: int) -> TrustReport:
    """Touches about half of the experts."""
    start = float(TOKENS_A_REPORT * (number - 1))
    delta = empty_table(IDENTITY.component, IDENTITY.layers, IDENTITY.num_experts, start)
    rng = np.random.default_rng(number)
    for aspect in range(len(ASPECTS)):
        experts_N = rng.integers(0, 32, 20)
        observe(delta, aspect, experts_N, rng.random(20), np.ones(20), start + 50.0, SETTINGS)
    observe_buckets(delta, rng.integers(0, 17, 5), rng.random(5) * 9, start + 50.0, SETTINGS)
    return TrustReport("victim", number, replace(delta, num_tokens=TOKENS_A_REPORT))


def table_after(num_reports: int) -> TrustTable:
    table = IDENTITY.empty_table()
    for number in range(1, num_reports + 1):
        table = merged(table, report_number(number).delta, SETTINGS)
    return table


def num_reports_in(path: Path) -> int:
    """How many reports a ledger holds, after checking that it holds them exactly."""
    ledger = TrustLedger(path, IDENTITY)
    table = ledger.table()
    ledger.close()
    count = table.num_tokens // TOKENS_A_REPORT
    expected = table_after(count)
    found = moved(table, expected.clock, SETTINGS)
    assert np.array_equal(found.counts_ALE, expected.counts_ALE)
    for name in ("sums_ALE", "weights_ALE", "bucket_sums_B", "bucket_weights_B"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9)
    assert not list(path.parent.glob("*.damaged*")), "a kill is no damage"
    return count


def own_and_report(path: Path, link: Connection, file_limit: int | None, checkpoint_pages: int) -> None:
    """The victim: adds report after report to what is there, and tells of each when it is acknowledged.

    file_limit: the kernel kills it in the middle of the write that goes beyond that many bytes of a file.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    ledger = TrustLedger(path, IDENTITY)
    ledger._connection.execute(f"PRAGMA wal_autocheckpoint = {checkpoint_pages}")
    number = ledger.table().num_tokens // TOKENS_A_REPORT
    while True:
        link.send(number)
        number += 1
        ledger.add(report_number(number))


@contextmanager
def victim(
    path: Path, file_limit: int | None = None, checkpoint_pages: int = 1000
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    link, other = _processes.Pipe()
    process = _processes.Process(
        target=own_and_report, args=(path, other, file_limit, checkpoint_pages), daemon=True
    )
    process.start()
    other.close()
    try:
        yield process, link
    finally:
        process.kill()
        process.join(DEADLINE_S)
        link.close()


def last_acknowledged(link: Connection) -> int:
    """What a victim that has died said last; 0 if nothing."""
    last = 0
    try:
        while link.poll(DEADLINE_S):
            last = link.recv()
    except EOFError:
        return last
    raise AssertionError("the victim does not end")


def kill_at_random(path: Path, rng: random.Random) -> int:
    """One more owner of the ledger, killed within some milliseconds of some report. Returns what it acknowledged."""
    with victim(path, checkpoint_pages=rng.choice((1, 8, 1000))) as (process, link):
        for _ in range(rng.randrange(1, 5)):
            assert link.poll(DEADLINE_S), "the victim does not begin"
            acknowledged = link.recv()
        # Not to wait for anything: the moment of the kill is meant to be any.
        threading.Event().wait(rng.uniform(0.0, 0.006))
        process.kill()
        return max(acknowledged, last_acknowledged(link))


def fill_disk_and_go_on(path: Path, link: Connection) -> None:
    """Runs into a limit that answers writes with an error, as a full disk does; then the limit is lifted."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ledger = TrustLedger(path, IDENTITY)
    ledger.add(report_number(1))
    size = Path(f"{path}-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
    try:
        ledger.add(report_number(2))
    except LedgerUnusable as error:
        link.send(str(error))
    link.send(ledger.table().num_tokens)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    link.send(ledger.add(report_number(2)).num_tokens)
    ledger.close()


def run_on_full_disk(path: Path) -> list[object]:
    """What `fill_disk_and_go_on` said."""
    link, other = _processes.Pipe()
    process = _processes.Process(target=fill_disk_and_go_on, args=(path, other), daemon=True)
    process.start()
    other.close()
    said: list[object] = []
    try:
        while link.poll(DEADLINE_S):
            said.append(link.recv())
    except EOFError:
        pass
    process.join(DEADLINE_S)
    return said
