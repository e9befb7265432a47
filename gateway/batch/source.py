"""Opens a batch's input, JSON lines or Parquet: what it is, its parts, and the rows of a part, in bounded memory.

The whole file is read once, to hash it, before any work starts; the worker opens it again and refuses it when it is
not the same file any more. Called by `gateway.batch.job` and `gateway.batch.worker`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol

from extraction.errors import one_line
from extraction.files import open_regular
from gateway.batch.parquet import ParquetRows
from gateway.batch.plan import MAX_INPUT_ROWS, InputFormat, Part, cut_lines, cut_rows
from gateway.batch.rows import RawRow
from gateway.errors import BatchInputInvalid
from gateway.http.settings import RequestLimits

MAX_LINE_BYTES = RequestLimits().max_body_bytes
"""Of a row in JSON, its line end included; as much as a request's body over HTTP."""
PIECE_BYTES = 1024 * 1024
FORMATS: dict[str, InputFormat] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class InputFile:
    """An input as it was when the job was planned."""

    path: str
    format: InputFormat
    nbytes: int
    mtime_ns: int
    sha256: str
    parts: tuple[Part, ...]
    ignored_columns: tuple[str, ...] = ()
    """Parquet columns that mean nothing to us."""

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


class RowReader(Protocol):
    """Rows of parts; quick when parts are asked for in ascending order."""

    def rows(self, part: Part) -> Iterator[RawRow]: ...


def plan_input(path: Path) -> InputFile:
    """Read the whole input once. Raises BatchInputInvalid, or ExtractionError for what is no regular file."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise BatchInputInvalid(str(path), f"must end in one of {', '.join(FORMATS)}")
    with _opened(path) as file:
        stat = os.fstat(file.fileno())
        ignored: tuple[str, ...] = ()
        if kind == "jsonl":
            digest = hashlib.sha256()
            parts = tuple(cut_lines((offset, size) for offset, size, _ in _lines(file, digest)))
            sha256 = digest.hexdigest()
        else:
            rows = ParquetRows(file, path.name)
            parts, ignored = cut_rows(rows.num_rows), rows.ignored_columns
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    planned = InputFile(str(path.resolve()), kind, stat.st_size, stat.st_mtime_ns, sha256, parts, ignored)
    if not 0 < planned.num_rows <= MAX_INPUT_ROWS:
        raise BatchInputInvalid(path.name, f"has {planned.num_rows} rows; 1 to {MAX_INPUT_ROWS} can be run")
    return planned


@contextmanager
def open_rows(path: str, kind: InputFormat, nbytes: int, mtime_ns: int) -> Iterator[RowReader]:
    """The rows of an input that was planned with this size and time. Raises BatchInputInvalid."""
    with _opened(Path(path)) as file:
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (nbytes, mtime_ns):
            raise BatchInputInvalid(path, "was changed while the batch ran")
        yield JsonlRows(file, path) if kind == "jsonl" else ParquetRows(file, Path(path).name)


class JsonlRows:
    """Lines of JSON; blank ones are no rows."""

    def __init__(self, file: BufferedReader, name: str) -> None:
        self._file, self._name = file, name

    def rows(self, part: Part) -> Iterator[RawRow]:
        """Raises BatchInputInvalid when the file has fewer rows than were counted."""
        self._file.seek(part.offset)
        lines = _lines(self._file)
        for index in range(part.first_row, part.first_row + part.num_rows):
            found = next(lines, None)
            if found is None:
                raise BatchInputInvalid(self._name, f"ends before row {index}")
            if found[2] is None:
                yield RawRow(index, error=f"The row is longer than {MAX_LINE_BYTES} bytes.")
            else:
                yield RawRow(index, line=found[2].strip())


def _lines(
    file: BufferedReader, digest: hashlib._Hash | None = None
) -> Iterator[tuple[int, int, bytes | None]]:
    """(offset, bytes, content) of the lines that are not blank from here on; no content of a line that is too long.

    digest: is given all bytes.
    """
    offset = file.tell()
    while line := file.readline(MAX_LINE_BYTES + 1):
        length, is_whole = len(line), len(line) <= MAX_LINE_BYTES
        piece = line
        if digest is not None:
            digest.update(piece)
        while not is_whole and not piece.endswith(b"\n") and (piece := file.readline(PIECE_BYTES)):
            length += len(piece)
            if digest is not None:
                digest.update(piece)
        if not is_whole or line.strip():
            yield offset, length, line if is_whole else None
        offset += length


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file; a link that the user named is followed."""
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise BatchInputInvalid(one_line(str(path)), reason or "is no path") from error
    with os.fdopen(open_regular(resolved), "rb") as file:
        yield file
