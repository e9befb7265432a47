"""What a ledger keeps, what it sets aside, and what it does not believe."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experts.errors import LedgerBusy, LedgerUnusable, TrustMismatch
from experts.trust import TrustReport, TrustTable, empty_table, trust_scores
from experts.trust_ledger import TrustIdentity, TrustLedger, ledger_path, read_ledger, reset_ledger
from tests.experts.ledger_kills import (
    IDENTITY,
    SETTINGS,
    TOKENS_A_REPORT,
    num_reports_in,
    report_number,
    table_after,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return ledger_path(tmp_path, IDENTITY.store_hash)


def _filled(path: Path, num_reports: int = 3) -> TrustTable:
    ledger = TrustLedger(path, IDENTITY)
    for number in range(1, num_reports + 1):
        ledger.add(report_number(number))
    ledger.close()
    return ledger.table()


def _edit(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(statement, values).rowcount != 0


def test_reopened_ledger_has_what_was_added(path: Path) -> None:
    kept = _filled(path)
    for found in (read_ledger(path, IDENTITY), TrustLedger(path, IDENTITY).table(), table_after(3)):
        np.testing.assert_allclose(trust_scores(found, SETTINGS), trust_scores(kept, SETTINGS), rtol=1e-12)
        assert found.num_tokens == 3 * TOKENS_A_REPORT


def test_report_sent_again_counts_once(path: Path) -> None:
    _filled(path)
    ledger = TrustLedger(path, IDENTITY)
    again = [ledger.add(report_number(number)) for number in (1, 3)]
    ledger.close()
    assert all(table is ledger.table() for table in again)
    assert num_reports_in(path) == 3


def test_reports_of_several_senders_all_count(path: Path) -> None:
    ledger = TrustLedger(path, IDENTITY)
    for sender in ("a", "b"):
        ledger.add(replace(report_number(1), sender=sender))
    ledger.close()
    assert (ledger.table().counts_ALE == 2 * report_number(1).delta.counts_ALE).all()


def test_second_owner_is_refused_and_readers_are_not(path: Path) -> None:
    ledger = TrustLedger(path, IDENTITY)
    ledger.add(report_number(1))
    with pytest.raises(LedgerBusy):
        TrustLedger(path, IDENTITY)
    with pytest.raises(LedgerBusy):
        reset_ledger(path)
    assert read_ledger(path, IDENTITY).num_tokens == TOKENS_A_REPORT
    ledger.close()
    with pytest.raises(LedgerUnusable, match="it is closed"):
        ledger.add(report_number(2))


def test_reset_forgets_everything(path: Path) -> None:
    _filled(path)
    assert reset_ledger(path)
    assert not reset_ledger(path)
    assert read_ledger(path, IDENTITY).num_tokens == 0
    assert num_reports_in(path) == 0


def test_ledger_is_readable_by_its_user_only(path: Path) -> None:
    _filled(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "change",
    [{"store_hash": "cd" * 32}, {"quantisation": "int8"}, {"component": "talker"}],
)
def test_trust_is_not_carried_over_to_another_identity(path: Path, change: dict[str, str]) -> None:
    _filled(path)
    other = replace(IDENTITY, **change)  # type: ignore[arg-type]
    assert read_ledger(path, other).num_tokens == 0
    TrustLedger(path, other).close()
    assert num_reports_in(path) == 3


def _overwrite_page(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096:8192] = b"\xa5" * 4096
    path.write_bytes(raw)


def _overwrite_header(path: Path) -> None:
    path.write_bytes(b"no database" * 500)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _drop_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE experts")


def _rename_column(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("ALTER TABLE subjects RENAME COLUMN clock TO time")


def _become_another(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 7")


@pytest.mark.parametrize(
    "damage", [_overwrite_page, _overwrite_header, _cut, _drop_table, _rename_column, _become_another]
)
def test_damaged_file_is_set_aside_and_nobody_is_trusted(
    path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    _filled(path, 40)
    damage(path)
    damaged = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        ledger = TrustLedger(path, IDENTITY)
    np.testing.assert_allclose(trust_scores(ledger.table(), SETTINGS), 0.5)
    assert "is damaged" in caplog.text and f"{path}.damaged" in caplog.text
    assert Path(f"{path}.damaged").read_bytes() == damaged
    ledger.add(report_number(1))
    ledger.close()
    assert read_ledger(path, IDENTITY).num_tokens == TOKENS_A_REPORT


def test_second_damaged_file_does_not_replace_the_first(path: Path) -> None:
    for _ in range(2):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no database" * 500)
        TrustLedger(path, IDENTITY).close()
        path.unlink()
    assert sorted(f.name.split(".", 2)[2] for f in path.parent.glob("*.damaged*")) == ["damaged", "damaged-2"]


def test_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    _filled(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 9")
    for use in (TrustLedger, read_ledger):
        with pytest.raises(LedgerUnusable, match="newer version \\(schema 9\\)"):
            use(path, IDENTITY)
    assert not list(path.parent.glob("*.damaged*"))


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_regular_file_is_refused(path: Path, make: Callable[[Path], None]) -> None:
    path.parent.mkdir()
    make(path)
    with pytest.raises(LedgerUnusable):
        TrustLedger(path, IDENTITY)


HOSTILE = [
    ("UPDATE experts SET convergence_sum = ? WHERE expert = 0", 1e300),
    ("UPDATE experts SET convergence_sum = ? WHERE expert = 0", -1.0),
    ("UPDATE experts SET convergence_sum = ? WHERE expert = 0", float("inf")),
    ("UPDATE experts SET convergence_weight = ? WHERE expert = 0", "much"),
    ("UPDATE experts SET convergence_weight = ? WHERE expert = 0", b"\x00"),
    ("UPDATE experts SET convergence_count = ? WHERE expert = 0", -5),
    ("UPDATE experts SET clock = ? WHERE expert = 0", 1e17),
    ("UPDATE experts SET expert = ? WHERE expert = 0", 16),
    ("UPDATE experts SET expert = ? WHERE expert = 0", -1),
    ("UPDATE experts SET expert = ? WHERE expert = 0", "none"),
    ("UPDATE experts SET layer = ? WHERE layer = 0", 1),
    ("UPDATE buckets SET sum = ?", 1e308),
    ("UPDATE buckets SET bucket = ? WHERE bucket = (SELECT min(bucket) FROM buckets)", 10**12),
    ("UPDATE subjects SET clock = ?", float("-inf")),
    ("UPDATE subjects SET num_tokens = ?", -1),
    ("UPDATE subjects SET num_tokens = ?", 0.5),
]


@pytest.mark.parametrize(("statement", "value"), HOSTILE)
def test_hostile_row_is_left_out_and_the_rest_is_read(path: Path, statement: str, value: object) -> None:
    sound = _filled(path, 8)
    _edit(path, statement, value)
    found = read_ledger(path, IDENTITY)
    is_changed = (found.sums_ALE != sound.sums_ALE) & (found.counts_ALE != sound.counts_ALE)
    assert np.isfinite(found.sums_ALE).all() and np.isfinite(found.bucket_sums_B).all()
    scores = trust_scores(found, SETTINGS)
    assert scores.min() >= 0.0 and scores.max() <= 1.0
    if "expert = 0" in statement:
        assert is_changed.any()
        assert not is_changed[:, :, 1:].any(), "other experts keep theirs"


def test_not_a_number_cannot_even_be_written(path: Path) -> None:
    _filled(path)
    with pytest.raises(sqlite3.IntegrityError):
        _edit(path, "UPDATE experts SET convergence_sum = ?", float("nan"))


@pytest.mark.parametrize(
    "delta",
    [
        empty_table("model", (0,), 16),
        empty_table("other", (0, 2), 16),
        replace(report_number(1).delta, sums_ALE=report_number(1).delta.sums_ALE * float("nan")),
        replace(report_number(1).delta, sums_ALE=report_number(1).delta.weights_ALE * 2),
    ],
)
def test_report_that_is_not_about_these_experts_is_refused(path: Path, delta: TrustTable) -> None:
    ledger = TrustLedger(path, IDENTITY)
    with pytest.raises(TrustMismatch):
        ledger.add(TrustReport("a", 1, delta))
    ledger.close()
    assert read_ledger(path, IDENTITY).num_tokens == 0


def test_identity_names_its_empty_table() -> None:
    identity = TrustIdentity("0" * 64, "int4", "talker", (1,), 3)
    assert identity.empty_table().sums_ALE.shape == (3, 1, 3)
