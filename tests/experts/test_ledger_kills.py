"""An acknowledged report is there after any kill, none is there by half, and none twice."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from experts.errors import LedgerBusy
from experts.trust_ledger import TrustLedger
from tests.experts import ledger_kills as kills

PAGE = 4096


@pytest.mark.parametrize("seed", range(3))
def test_owner_killed_ten_times_loses_nothing_acknowledged(tmp_path: Path, seed: int) -> None:
    _kill_again_and_again(tmp_path / "ledger.sqlite3", random.Random(seed), 10)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(100, 104))
def test_owner_killed_a_hundred_times_loses_nothing_acknowledged(tmp_path: Path, seed: int) -> None:
    _kill_again_and_again(tmp_path / "ledger.sqlite3", random.Random(seed), 100)


def _kill_again_and_again(path: Path, rng: random.Random, num_kills: int) -> None:
    for _ in range(num_kills):
        acknowledged = kills.kill_at_random(path, rng)
        found = kills.num_reports_in(path)
        assert acknowledged <= found <= acknowledged + 1


@pytest.mark.parametrize(
    "file_limit",
    [1, 100, PAGE - 1, PAGE + 25, *range(3 * PAGE + 7, 80 * PAGE, 7 * PAGE + 1111)],
)
def test_owner_killed_inside_a_write_loses_nothing_acknowledged(tmp_path: Path, file_limit: int) -> None:
    path = tmp_path / "ledger.sqlite3"
    with kills.victim(path, file_limit) as (_, link):
        acknowledged = kills.last_acknowledged(link)
    assert acknowledged <= kills.num_reports_in(path) <= acknowledged + 1


def test_log_cut_anywhere_leaves_a_whole_number_of_reports(tmp_path: Path) -> None:
    origin = tmp_path / "origin" / "ledger.sqlite3"
    with kills.victim(origin) as (process, link):
        while link.recv() < 6:
            pass
        process.kill()
        process.join(kills.DEADLINE_S)
    log = Path(f"{origin}-wal").read_bytes()
    found = []
    for index in range(12):
        copy = tmp_path / f"copy-{index}" / "ledger.sqlite3"
        copy.parent.mkdir()
        shutil.copy(origin, copy)
        Path(f"{copy}-wal").write_bytes(log[: len(log) * index // 11])
        found.append(kills.num_reports_in(copy))
    assert found == sorted(found)
    assert found[0] == 0 and found[-1] >= 6


def test_full_disk_refuses_a_report_and_takes_it_later(tmp_path: Path) -> None:
    error, before, after = kills.run_on_full_disk(tmp_path / "ledger.sqlite3")
    assert str(error).startswith("trust ledger") and "\n" not in str(error)
    assert (before, after) == (kills.TOKENS_A_REPORT, 2 * kills.TOKENS_A_REPORT)
    assert kills.num_reports_in(tmp_path / "ledger.sqlite3") == 2


def test_owner_in_another_process_keeps_a_second_one_out_until_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    with kills.victim(path) as (process, link):
        assert link.recv() == 0
        with pytest.raises(LedgerBusy, match="another process keeps this trust ledger"):
            TrustLedger(path, kills.IDENTITY)
        process.kill()
        process.join(kills.DEADLINE_S)
        TrustLedger(path, kills.IDENTITY).close()
