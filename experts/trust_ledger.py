"""Where trust survives: one SQLite file a store, written by one thread of one owner.

`add` returns when its report is on disk; whoever is killed at any moment later finds the state of the last report
that was acknowledged, or of one more. A file that is damaged is set aside, said so in the log, and a new one begun in
which nobody is trusted more than others. What a file holds is believed only row by row: whatever is out of range, or
about other experts, is left out. Format: docs/trust.md.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from experts.errors import LedgerBusy, LedgerUnusable
from experts.trust import TrustReport, TrustSettings, TrustTable, check_delta, empty_table, merged
from experts.trust_rows import check_sound, create_schema, is_reported, read_table, write_report

logger = logging.getLogger(__name__)

FOLDER_MODE, FILE_MODE = 0o700, 0o600
COMPANIONS = ("-wal", "-shm", "")
"""Ends of the names of the files that SQLite keeps for one database. The file itself goes last: without it, a log that
was left behind would be replayed into the next."""
ENVIRONMENT_CODES = frozenset(
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("BUSY", "CANTOPEN", "FULL", "IOERR", "LOCKED", "NOMEM", "PERM", "READONLY")
)
"""SQLite's codes for what is wrong with the machine; the file may be whole."""


@dataclass(frozen=True)
class TrustIdentity:
    """Whose trust it is: it is not carried over to other weights, nor to the same in another quantisation."""

    store_hash: str
    quantisation: str
    """The dtype that the experts are stored in."""
    component: str
    layers: tuple[int, ...]
    """With experts, ascending."""
    num_experts: int
    """Of each layer."""

    def empty_table(self) -> TrustTable:
        return empty_table(self.component, self.layers, self.num_experts)


@dataclass(frozen=True)
class _Work:
    report: TrustReport
    done: Future[TrustTable]


class TrustLedger:
    """Owns a ledger file from `__init__` to `close`. `add` and `table` may be called from any thread."""

    def __init__(self, path: Path, identity: TrustIdentity, settings: TrustSettings | None = None) -> None:
        """Raises LedgerBusy when somebody owns the file, LedgerUnusable when it cannot be opened or written."""
        self.path, self.identity = path, identity
        self._settings = settings or TrustSettings()
        self._lock_file = _own(path)
        try:
            self._connection, self._table = _open_or_set_aside(path, identity, self._settings)
        except (sqlite3.Error, OSError) as error:
            os.close(self._lock_file)
            raise LedgerUnusable(str(path), str(error)) from error
        except LedgerUnusable:
            os.close(self._lock_file)
            raise
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._admission = threading.Lock()
        self._is_closed = False
        self._writer = threading.Thread(target=self._write, name="trust-ledger", daemon=True)
        self._writer.start()

    def table(self) -> TrustTable:
        """Everything that was acknowledged."""
        return self._table

    def add(self, report: TrustReport) -> TrustTable:
        """Add a report's delta and return the sums with it, once both are on disk. A report that is there is not
        added again.

        Raises LedgerUnusable when it could not be written: it may be sent again. Raises TrustMismatch for a delta
        about other experts, or with numbers that observations cannot have.
        """
        check_delta(report.delta, self._table)
        done: Future[TrustTable] = Future()
        with self._admission:
            if self._is_closed:
                raise LedgerUnusable(str(self.path), "it is closed")
            self._work.put(_Work(report, done))
        return done.result()

    def close(self) -> None:
        """Finish what was asked, then let go of the file."""
        with self._admission:
            if self._is_closed:
                return
            self._is_closed = True
            self._work.put(None)
        self._writer.join()
        self._connection.close()
        os.close(self._lock_file)

    def _write(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work.done.set_result(self._commit(work.report))
            except sqlite3.Error as error:
                work.done.set_exception(LedgerUnusable(str(self.path), str(error)))
            except Exception as error:  # noqa: BLE001 - it belongs to whoever sent the report
                work.done.set_exception(error)

    def _commit(self, report: TrustReport) -> TrustTable:
        if is_reported(self._connection, report):
            return self._table
        table = merged(self._table, report.delta, self._settings)
        with _transaction(self._connection):
            write_report(self._connection, self.identity, report, table)
        self._table = table
        return table


def ledger_path(state_folder: Path, store_hash: str) -> Path:
    """One file a store, so that services of different stores do not wait for each other."""
    return state_folder / "trust" / f"{store_hash[:32]}.sqlite3"


def read_ledger(path: Path, identity: TrustIdentity, settings: TrustSettings | None = None) -> TrustTable:
    """What a ledger holds now, without owning it; empty where there is none. Raises LedgerUnusable."""
    if not path.exists():
        return identity.empty_table()
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            check_sound(connection, path)
            return read_table(connection, identity, settings or TrustSettings())
    except sqlite3.Error as error:
        raise LedgerUnusable(str(path), str(error)) from error


def reset_ledger(path: Path) -> bool:
    """Forget everything. False when there was nothing. Raises LedgerBusy while somebody owns it, LedgerUnusable."""
    if not path.exists():
        return False
    lock_file = _own(path)
    try:
        for companion in COMPANIONS:
            Path(f"{path}{companion}").unlink(missing_ok=True)
    except OSError as error:
        raise LedgerUnusable(str(path), error.strerror or "cannot be removed") from error
    finally:
        os.close(lock_file)
    return True


def _own(path: Path) -> int:
    """Lock a file beside the ledger. The lock goes with the process, however it ends; the file stays."""
    try:
        path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        lock_file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    except OSError as error:
        raise LedgerUnusable(str(path), error.strerror or "cannot be opened") from error
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_file)
        raise LedgerBusy(str(path)) from error
    return lock_file


def _open_or_set_aside(
    path: Path, identity: TrustIdentity, settings: TrustSettings
) -> tuple[sqlite3.Connection, TrustTable]:
    try:
        return _open(path, identity, settings)
    except sqlite3.Error as error:
        if not _is_damage(error):
            raise
        aside = _free_name(path)
        for companion in COMPANIONS:
            if os.path.lexists(f"{path}{companion}"):
                os.rename(f"{path}{companion}", f"{aside}{companion}")
        logger.warning("trust ledger %s is damaged (%s): kept as %s, beginning anew", path, error, aside)
        return _open(path, identity, settings)


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code == sqlite3.SQLITE_IOERR_SHORT_READ or code & 0xFF not in ENVIRONMENT_CODES


def _open(
    path: Path, identity: TrustIdentity, settings: TrustSettings
) -> tuple[sqlite3.Connection, TrustTable]:
    """Raises sqlite3.Error for a damaged file, LedgerUnusable for one of a newer version."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE))
    # One thread after another uses it: the one that opens, then the writer, then the one that closes.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if check_sound(connection, path):
            with _transaction(connection):
                create_schema(connection)
        return connection, read_table(connection, identity, settings)
    except BaseException:
        connection.close()
        raise


def _free_name(path: Path) -> Path:
    names = (Path(f"{path}.damaged{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next((name for name in names if not os.path.lexists(name)), Path(f"{path}.damaged"))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
