"""The folder that a batch writes: part files that appear whole, in any order, and a manifest when all are there.

Names that begin with an underscore or a dot are left out by readers of Parquet folders. `_job.json` says whose
output it is and comes first, `_manifest.json` says that it is complete and comes last; a file under its final name is
never changed again. Called by `gateway.batch.job` and `gateway.batch.worker`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from extraction.errors import ExtractionError
from extraction.files import read_small_file
from gateway.batch.plan import FORMAT_VERSION, Part, first_difference
from gateway.errors import BatchFailed, BatchOutputRefused

JOB_FILE = "_job.json"
MANIFEST_FILE = "_manifest.json"
MAX_JOB_BYTES = 64 * 1024
FOOTER_KEY = b"sage-moe"
DAMAGED = "is not as it was written; remove it and run the command again"
TEMPORARY = re.compile(r"\.[A-Za-z0-9_.-]{1,64}\.[0-9a-f]{8}\.tmp")
PART_NAME = re.compile(r"part-[0-9]{6,}\.parquet")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("error", pa.string()),
        pa.field("index", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ResultRow:
    """One row of the output. Has an error, or everything else but the id, which the input may leave out."""

    index: int
    id: str | None
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class PartSummary:
    """What a part's footer says of its rows."""

    number: int
    num_rows: int
    num_errors: int
    prompt_tokens: int
    completion_tokens: int
    numerics_class: str


class OutputFolder:
    """Where parts are written. Several processes may write the same part: they write the same bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def is_complete(self) -> bool:
        return (self.root / MANIFEST_FILE).is_file()

    def part_files(self) -> list[str]:
        """Names of the parts that are there."""
        return sorted(name for name in os.listdir(self.root) if PART_NAME.fullmatch(name))

    def write_part(self, part: Part, rows: Sequence[ResultRow], numerics_class: str) -> PartSummary:
        """rows: all of the part's, in order. Raises BatchFailed when the disk does not take them."""
        assert [row.index for row in rows] == list(range(part.first_row, part.first_row + part.num_rows))
        summary = _summarize(part, rows, numerics_class)
        table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, SCHEMA, compression="zstd", store_schema=False) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({FOOTER_KEY: json.dumps(asdict(summary))})
        write_whole(self.root, part.file, buffer.getvalue())
        return summary

    def read_summary(self, part: Part) -> PartSummary:
        """Of a part that is there. Raises BatchOutputRefused when it is not as it was written."""
        summary = self.read_any_summary(part.file)
        if (summary.number, summary.num_rows) != (part.number, part.num_rows):
            raise BatchOutputRefused(str(self.root / part.file), DAMAGED)
        return summary

    def read_any_summary(self, file: str) -> PartSummary:
        """Like `read_summary`, of whatever rows the part holds."""
        try:
            metadata = pq.read_metadata(self.root / file)
            summary = PartSummary(**json.loads(metadata.metadata[FOOTER_KEY]))
            if metadata.num_rows != summary.num_rows:
                raise ValueError("it holds other rows")
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise BatchOutputRefused(str(self.root / file), DAMAGED) from error
        return summary

    def write_manifest(self, identity: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, int]:
        """Say that all parts are there. Returns the totals. Raises BatchOutputRefused or BatchFailed."""
        entries, totals = [], dict.fromkeys(("rows", "errors", "prompt_tokens", "completion_tokens"), 0)
        for part in parts:
            summary = self.read_summary(part)
            with open(self.root / part.file, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                nbytes = file.tell()
            entries.append(
                {
                    "file": part.file,
                    "first_row": part.first_row,
                    "rows": part.num_rows,
                    "errors": summary.num_errors,
                    "numerics_class": summary.numerics_class,
                    "nbytes": nbytes,
                    "sha256": sha256,
                }
            )
            totals["rows"] += part.num_rows
            totals["errors"] += summary.num_errors
            totals["prompt_tokens"] += summary.prompt_tokens
            totals["completion_tokens"] += summary.completion_tokens
        content = {"format_version": FORMAT_VERSION, "job": identity, **totals, "parts": entries}
        write_whole(self.root, MANIFEST_FILE, json.dumps(content, indent=1).encode())
        return totals

    def read_totals(self) -> dict[str, int]:
        """Of a complete output. Raises BatchOutputRefused."""
        try:
            content = json.loads((self.root / MANIFEST_FILE).read_bytes())
            names = ("rows", "errors", "prompt_tokens", "completion_tokens")
            return {name: int(content[name]) for name in names}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BatchOutputRefused(str(self.root / MANIFEST_FILE), "is damaged; remove it") from error


@contextmanager
def claimed(root: Path, identity: Mapping[str, Any], parts: Sequence[Part]) -> Iterator[OutputFolder]:
    """The output of this job, made or found again, for one driver at a time.

    Raises BatchOutputRefused when it is another job's, somebody works on it, or it holds what no job put there.
    """
    root = root.absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BatchOutputRefused(str(root), error.strerror or "cannot be made") from error
    try:
        _lock(descriptor, root)
        _take(root, identity, parts)
        yield OutputFolder(root)
    finally:
        os.close(descriptor)


def write_whole(root: Path, name: str, content: bytes) -> None:
    """A file that appears under its name whole and synced, or not at all. Raises BatchFailed."""
    temporary = root / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, root / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(root)
    except OSError as error:
        raise BatchFailed(f"{root / name} cannot be written: {error.strerror or error}") from error


def _summarize(part: Part, rows: Sequence[ResultRow], numerics_class: str) -> PartSummary:
    return PartSummary(
        part.number,
        part.num_rows,
        sum(row.error is not None for row in rows),
        sum(row.prompt_tokens or 0 for row in rows),
        sum(row.completion_tokens or 0 for row in rows),
        numerics_class,
    )


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BatchOutputRefused(str(root), "another run is writing to it") from error
        # Some network file systems have no locks.


def _take(root: Path, identity: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Make sure that the folder is this job's, and remove what a killed run left unfinished."""
    names = os.listdir(root)
    unfinished = [name for name in names if TEMPORARY.fullmatch(name)]
    if JOB_FILE in names:
        _check_job(root, identity)
    elif len(unfinished) < len(names):
        raise BatchOutputRefused(str(root), "is not empty and no batch's output; choose another folder")
    known = {JOB_FILE, MANIFEST_FILE, *unfinished, *(part.file for part in parts)}
    strange = sorted(set(names) - known)
    if strange:
        raise BatchOutputRefused(str(root / strange[0]), "is not of this job; move it out of the folder")
    for name in unfinished:
        with suppress(FileNotFoundError):
            os.unlink(root / name)
    if JOB_FILE not in names:
        write_whole(root, JOB_FILE, json.dumps(identity, indent=1).encode())


def _check_job(root: Path, identity: Mapping[str, Any]) -> None:
    try:
        before = json.loads(read_small_file(root, JOB_FILE, MAX_JOB_BYTES))
        difference = first_difference(before, identity)
    except (ExtractionError, ValueError, AttributeError, RecursionError) as error:
        raise BatchOutputRefused(str(root / JOB_FILE), "is damaged; choose another folder") from error
    if difference is not None:
        raise BatchOutputRefused(
            str(root),
            f"is another job's output ({difference}); choose another folder or give the same options",
        )


def _sync_folder(root: Path) -> None:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
