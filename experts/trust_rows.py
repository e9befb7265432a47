"""The ledger's tables: schema, rows out of a trust table, and rows back into one, each checked. Called by
`experts.trust_ledger`, which owns connections and transactions.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experts.errors import LedgerUnusable
from experts.trust import ASPECTS, NUM_BUCKETS, TrustReport, TrustSettings, TrustTable

if TYPE_CHECKING:
    from experts.trust_ledger import TrustIdentity

SCHEMA_VERSION = 1
APPLICATION_ID = 0x53414745
"""Marks the file as ours: "SAGE"."""
MAX_TOKENS = 1 << 52
"""Of a clock, so that it stays whole in a float."""
MAX_NLL = 1e3
"""Nats; a mean beyond it is no mean of NLLs."""
MAX_SENDERS = 1024
SCHEMA = (
    """CREATE TABLE subjects (
        id INTEGER PRIMARY KEY, store_hash TEXT NOT NULL, quantisation TEXT NOT NULL, component TEXT NOT NULL,
        clock REAL NOT NULL, num_tokens INTEGER NOT NULL, UNIQUE (store_hash, quantisation, component))""",
    """CREATE TABLE experts (
        subject INTEGER NOT NULL, layer INTEGER NOT NULL, expert INTEGER NOT NULL, clock REAL NOT NULL,
        convergence_sum REAL NOT NULL, stability_sum REAL NOT NULL, efficiency_sum REAL NOT NULL,
        convergence_weight REAL NOT NULL, stability_weight REAL NOT NULL, efficiency_weight REAL NOT NULL,
        convergence_count INTEGER NOT NULL, stability_count INTEGER NOT NULL, efficiency_count INTEGER NOT NULL,
        PRIMARY KEY (subject, layer, expert)) WITHOUT ROWID""",
    """CREATE TABLE buckets (
        subject INTEGER NOT NULL, bucket INTEGER NOT NULL, clock REAL NOT NULL, sum REAL NOT NULL,
        weight REAL NOT NULL, PRIMARY KEY (subject, bucket)) WITHOUT ROWID""",
    "CREATE TABLE senders (sender TEXT NOT NULL PRIMARY KEY, sequence INTEGER NOT NULL)",
)
TABLES = frozenset(("subjects", "experts", "buckets", "senders"))


def check_sound(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is new and has no schema yet.

    Raises sqlite3.DatabaseError when it is damaged or no ledger, LedgerUnusable when it is of a newer version.
    """
    found = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != ("ok",):
        raise sqlite3.DatabaseError(str(found[0])[:200])
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if version == 0 and not names:
        return True
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise sqlite3.DatabaseError("it is no trust ledger")
    if version > SCHEMA_VERSION:
        raise LedgerUnusable(str(path), f"was written by a newer version (schema {version})")
    if version != SCHEMA_VERSION or not names >= TABLES:
        raise sqlite3.DatabaseError("it has not the tables of its version")
    return False


def create_schema(connection: sqlite3.Connection) -> None:
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def is_reported(connection: sqlite3.Connection, report: TrustReport) -> bool:
    found = connection.execute("SELECT sequence FROM senders WHERE sender = ?", (report.sender,)).fetchone()
    return found is not None and report.sequence <= found[0]


def write_report(
    connection: sqlite3.Connection, identity: TrustIdentity, report: TrustReport, table: TrustTable
) -> None:
    """Write `table`, which holds the report: the rows that the report's delta touches, and the clock."""
    subject = _write_subject(connection, identity, table)
    cells_AN = np.flatnonzero(report.delta.counts_ALE.any(axis=0))
    rows_N, experts_N = np.divmod(cells_AN, table.num_experts)
    columns = [array.reshape(len(ASPECTS), -1)[:, cells_AN] for array in _arrays(table)]
    layers_N = np.asarray(table.layers, dtype=np.int64)[rows_N]
    numbers = [column.tolist() for array in columns for column in array]
    rows = zip(layers_N.tolist(), experts_N.tolist(), repeat(table.clock), *numbers, strict=False)
    marks = ",".join("?" * (3 + len(numbers)))
    connection.executemany(f"REPLACE INTO experts VALUES ({subject},{marks})", rows)
    buckets = np.flatnonzero(report.delta.bucket_weights_B)
    sums, weights = table.bucket_sums_B[buckets].tolist(), table.bucket_weights_B[buckets].tolist()
    connection.executemany(
        f"REPLACE INTO buckets VALUES ({subject},?,?,?,?)",
        zip(buckets.tolist(), repeat(table.clock), sums, weights, strict=False),
    )
    connection.execute("REPLACE INTO senders VALUES (?,?)", (report.sender, report.sequence))
    # Each report of a sender gives it a new and larger row id, so those that are long silent are forgotten first.
    connection.execute(
        "DELETE FROM senders WHERE rowid <= (SELECT max(rowid) FROM senders) - ?", (MAX_SENDERS,)
    )


def _write_subject(connection: sqlite3.Connection, identity: TrustIdentity, table: TrustTable) -> int:
    """Returns its number."""
    values = (*_whose(identity), table.clock, table.num_tokens)
    found = connection.execute(
        """INSERT INTO subjects (store_hash, quantisation, component, clock, num_tokens) VALUES (?,?,?,?,?)
        ON CONFLICT DO UPDATE SET clock = excluded.clock, num_tokens = excluded.num_tokens RETURNING id""",
        values,
    ).fetchone()
    return int(found[0])


def _whose(identity: TrustIdentity) -> tuple[str, str, str]:
    return identity.store_hash, identity.quantisation, identity.component


def _arrays(table: TrustTable) -> tuple[npt.NDArray[Any], ...]:
    """In the order of the columns."""
    return table.sums_ALE, table.weights_ALE, table.counts_ALE


def read_table(
    connection: sqlite3.Connection, identity: TrustIdentity, settings: TrustSettings
) -> TrustTable:
    """The identity's sums; rows about anything else, or with numbers out of range, are left out."""
    subject = connection.execute(
        """SELECT id, clock, num_tokens FROM subjects
        WHERE store_hash = ? AND quantisation = ? AND component = ?""",
        _whose(identity),
    ).fetchone()
    if subject is None or not (_is_number(subject[1], 0, MAX_TOKENS) and _is_count(subject[2])):
        return identity.empty_table()
    table = replace(identity.empty_table(), clock=float(subject[1]), num_tokens=subject[2])
    ages = _Ages(table.clock, settings)
    row_of_layer = {layer: row for row, layer in enumerate(identity.layers)}
    for _, layer, expert, clock, *numbers in connection.execute(
        "SELECT * FROM experts WHERE subject = ?", subject[:1]
    ):
        is_known = layer in row_of_layer and isinstance(expert, int) and 0 <= expert < identity.num_experts
        if is_known and _is_number(clock, 0, table.clock):
            _put(table, row_of_layer[layer], expert, numbers, ages.scales(clock))
    for bucket, clock, total, weight in connection.execute(
        "SELECT bucket, clock, sum, weight FROM buckets WHERE subject = ?", subject[:1]
    ):
        is_known = isinstance(bucket, int) and 0 <= bucket < NUM_BUCKETS and _is_number(clock, 0, table.clock)
        if is_known and _is_sum(total, weight, MAX_NLL):
            scale = ages.scales(clock)[-1]
            table.bucket_sums_B[bucket], table.bucket_weights_B[bucket] = total * scale, weight * scale
    return table


def _put(table: TrustTable, row: int, expert: int, numbers: Sequence[Any], scales: Sequence[float]) -> None:
    for aspect in range(len(ASPECTS)):
        total, weight, count = numbers[aspect :: len(ASPECTS)]
        if _is_sum(total, weight, 1.0) and _is_count(count):
            cell = (aspect, row, expert)
            table.sums_ALE[cell], table.weights_ALE[cell] = total * scales[aspect], weight * scales[aspect]
            table.counts_ALE[cell] = count


class _Ages:
    """What rows of earlier clocks weigh now; many rows share a clock."""

    def __init__(self, clock: float, settings: TrustSettings) -> None:
        self._clock, self._settings = clock, settings
        self._known: dict[float, list[float]] = {}

    def scales(self, clock: float) -> list[float]:
        """By aspect, then the buckets'."""
        if clock not in self._known:
            half_lives = (*self._settings.half_lives, self._settings.bucket_half_life)
            self._known[clock] = [math.exp2((clock - self._clock) / half_life) for half_life in half_lives]
        return self._known[clock]


def _is_number(value: object, low: float, high: float) -> bool:
    """SQLite lets a row hold any type, and reads NaN back as None."""
    return isinstance(value, int | float) and math.isfinite(value) and low <= value <= high


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_TOKENS


def _is_sum(total: Any, weight: Any, mean_limit: float) -> bool:
    """Whether these can be the sum and the weight of values from 0 to a limit; rounding allowed for."""
    if not (_is_number(weight, 0, MAX_TOKENS) and _is_number(total, 0, MAX_TOKENS * mean_limit)):
        return False
    return bool(total <= weight * mean_limit * (1 + 1e-9))
