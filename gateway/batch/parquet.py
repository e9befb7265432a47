"""Rows of a Parquet file that somebody else wrote: the schema is held against a list of plain types first.

A footer can carry an Arrow schema that names extension types. To read it runs the code of any type of that name that
is registered in the process, and some unpickle what the file holds (Ray Data registered such types before 2.60,
CVE-2026-41486). So the footer is parsed without that key: no type can come from it, and a file in which it names an
extension type is refused. Neither Ray Data nor any reader but this one ever opens the file. Called by
`gateway.batch.source`.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from extraction.errors import one_line
from extraction.expert_index import ARROW_SCHEMA_KEY
from gateway.batch.plan import MAX_INPUT_ROWS, Part
from gateway.batch.rows import RawRow
from gateway.errors import BatchInputInvalid
from gateway.http.field_policy import UNSUPPORTED
from gateway.http.openai_types import ChatRequest, CompletionRequest
from gateway.http.settings import RequestLimits

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 64 * 1024 * 1024
MAX_COLUMNS = 1000
MAX_CHUNK_BYTES = 1 << 30
MAX_CHUNK_VALUES = 1 << 27
"""Of one column in one row group: lists of a row group may be decoded at once, and a few bytes can stand for billions
of equal values."""
MAX_ROW_CHARS = RequestLimits().max_body_bytes
READ_ROWS = 16
READ_BUFFER_BYTES = 1 << 20
MASKED_KEY = ARROW_SCHEMA_KEY.lower()
EXTENSION_MARK = b"ARROW:extension"

TEXTS = frozenset({"text"})
NUMBERS = frozenset({"whole", "fraction"})
COLUMNS: Mapping[str, frozenset[str]] = {
    "id": frozenset({"text", "whole"}),
    "model": TEXTS,
    "prompt": frozenset({"text", "wholes"}),
    "messages": frozenset({"messages"}),
    "max_tokens": NUMBERS,
    "min_tokens": NUMBERS,
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "top_k": NUMBERS,
    "min_p": NUMBERS,
    "presence_penalty": NUMBERS,
    "frequency_penalty": NUMBERS,
    "repetition_penalty": NUMBERS,
    "seed": NUMBERS,
    "stop": frozenset({"text", "texts"}),
}
"""What a column may hold; see `_kind`."""
WHOLE_FIELDS = ("max_tokens", "min_tokens", "top_k", "seed")
"""Columns of whole numbers, which pandas turns into fractions where some rows have none."""
REFUSED_COLUMNS = (
    frozenset({*UNSUPPORTED, *ChatRequest.model_fields, *CompletionRequest.model_fields, "body", "custom_id"})
    - COLUMNS.keys()
)
"""Fields of the API that would change an answer and have no column."""


class ParquetRows:
    """A checked file. Not safe for several threads."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Raises BatchInputInvalid."""
        self._name = name
        metadata = _read_metadata(file, name)
        if metadata.num_rows > MAX_INPUT_ROWS or metadata.num_columns > MAX_COLUMNS:
            raise BatchInputInvalid(name, f"has more than {MAX_INPUT_ROWS} rows or {MAX_COLUMNS} columns")
        self.num_rows: int = metadata.num_rows
        try:
            self._file = pq.ParquetFile(
                file,
                metadata=metadata,
                pre_buffer=False,
                buffer_size=READ_BUFFER_BYTES,
                page_checksum_verification=True,
                arrow_extensions_enabled=False,
            )
            schema = self._file.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise BatchInputInvalid(name, f"is no Parquet file: {one_line(str(error))}") from error
        self._columns, self.ignored_columns = check_schema(schema, name)
        self._first_rows = _check_groups(metadata, self._columns, name)
        self._cursor: tuple[int, Iterator[dict[str, Any] | str]] | None = None

    def rows(self, part: Part) -> Iterator[RawRow]:
        """Raises BatchInputInvalid for a damaged file."""
        if self._cursor is None or self._cursor[0] != part.first_row:
            self._cursor = (part.first_row, self._cells(part.first_row))
        cells = self._cursor[1]
        end = part.first_row + part.num_rows
        for index in range(part.first_row, end):
            row = self._next(cells, index)
            yield RawRow(index, error=row) if isinstance(row, str) else RawRow(index, fields=row)
        self._cursor = (end, cells)

    def _next(self, cells: Iterator[dict[str, Any] | str], index: int) -> dict[str, Any] | str:
        try:
            return next(cells)
        except StopIteration as error:
            raise BatchInputInvalid(self._name, f"has no row {index}, though its footer says so") from error
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise BatchInputInvalid(
                self._name, f"cannot be read near row {index}: {one_line(str(error))}"
            ) from error

    def _cells(self, first_row: int) -> Iterator[dict[str, Any] | str]:
        """Rows from this one on; of a row that cannot be read, why."""
        for group, start in enumerate(self._first_rows):
            end = self._first_rows[group + 1] if group + 1 < len(self._first_rows) else self.num_rows
            if end <= first_row:
                continue
            skip = max(0, first_row - start)
            batches = self._file.iter_batches(READ_ROWS, [group], self._columns, use_threads=False)
            for batch in batches:
                for row in range(min(skip, batch.num_rows), batch.num_rows):
                    yield read_cells(batch, row)
                skip = max(0, skip - batch.num_rows)


def check_schema(schema: pa.Schema, name: str) -> tuple[list[str], tuple[str, ...]]:
    """Columns that are read, and those that mean nothing here. Raises BatchInputInvalid.

    A column that is not read may have any type: nothing of it is decoded.
    """
    if len(set(schema.names)) != len(schema.names):
        raise BatchInputInvalid(name, "has two columns of one name")
    for column in schema.names:
        if column in REFUSED_COLUMNS:
            raise BatchInputInvalid(name, f"column {column} is not supported in Parquet; use a JSONL file")
        if column in COLUMNS and _kind(schema.field(column).type) not in COLUMNS[column]:
            kind = one_line(str(schema.field(column).type))
            raise BatchInputInvalid(name, f"column {column} has the type {kind}, which is not supported")
    columns = [column for column in schema.names if column in COLUMNS]
    if "prompt" not in columns and "messages" not in columns:
        raise BatchInputInvalid(name, "has neither a column prompt nor a column messages")
    return columns, tuple(one_line(column)[:64] for column in schema.names if column not in COLUMNS)


def _kind(kind: pa.DataType) -> str:
    """The name of a plain type in COLUMNS, or an empty string for any other."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "whole"
    if pa.types.is_floating(kind):
        return "fraction"
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return ""
    item = kind.value_type
    if pa.types.is_struct(item):
        fields = {field.name: _kind(field.type) for field in item}
        return "messages" if fields == {"role": "text", "content": "text"} and item.num_fields == 2 else ""
    return {"text": "texts", "whole": "wholes"}.get(_kind(item), "")


def read_cells(batch: pa.RecordBatch, row: int) -> dict[str, Any] | str:
    """The columns of a row that have a value, or why the row cannot be read."""
    fields: dict[str, Any] = {}
    num_chars = 0
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = values[row].as_py()
        except UnicodeDecodeError:
            return f"{column} is not UTF-8."
        if value is None:
            continue
        if column in WHOLE_FIELDS and isinstance(value, float) and value.is_integer():
            value = int(value)
        if column == "messages":
            value = [{k: v for k, v in turn.items() if v is not None} if turn else turn for turn in value]
            num_chars += sum(len(text) for turn in value if turn for text in turn.values())
        elif isinstance(value, str | list):
            num_chars += len(value)
        fields[column] = value
    if num_chars > MAX_ROW_CHARS:
        return f"The row is longer than {MAX_ROW_CHARS} characters."
    return fields


def _read_metadata(file: BinaryIO, name: str) -> pq.FileMetaData:
    """The footer without its Arrow schema, which must name no extension type."""
    footer = _read_footer(file, name)
    num_keys = footer.count(ARROW_SCHEMA_KEY)
    masked = footer.replace(ARROW_SCHEMA_KEY, MASKED_KEY)
    try:
        tail = masked + len(masked).to_bytes(4, "little") + MAGIC
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + tail))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BatchInputInvalid(name, f"is no Parquet file: {one_line(str(error))}") from error
    if num_keys:
        _check_arrow_schema((metadata.metadata or {}).get(MASKED_KEY), num_keys, name)
    return metadata


def _check_arrow_schema(encoded: bytes | None, num_keys: int, name: str) -> None:
    """Raises BatchInputInvalid for anything but one schema without extension types, as pyarrow and pandas write."""
    try:
        schema = base64.b64decode(encoded or b"", validate=True)
    except (binascii.Error, ValueError):
        schema = b""
    if num_keys > 1 or not schema:
        raise BatchInputInvalid(name, "has an Arrow schema in its footer that no writer would put there")
    if EXTENSION_MARK in schema:
        raise BatchInputInvalid(name, "has columns of extension types; write it with plain types only")


def _read_footer(file: BinaryIO, name: str) -> bytes:
    nbytes = os.fstat(file.fileno()).st_size
    file.seek(max(0, nbytes - 8))
    tail = file.read(8)
    size = int.from_bytes(tail[:4], "little")
    if len(tail) < 8 or tail[4:] != MAGIC or size + 12 > nbytes:
        raise BatchInputInvalid(name, "is no Parquet file, or is cut short or encrypted")
    if size > MAX_FOOTER_BYTES:
        raise BatchInputInvalid(name, f"has a footer of more than {MAX_FOOTER_BYTES} bytes")
    file.seek(nbytes - 8 - size)
    return file.read(size)


def _check_groups(metadata: pq.FileMetaData, columns: list[str], name: str) -> list[int]:
    """The first row of each row group. Raises BatchInputInvalid for one that cannot be read in bounded memory."""
    first_rows, total = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        first_rows.append(total)
        total += group.num_rows
        for index in range(group.num_columns):
            chunk = group.column(index)
            if chunk.path_in_schema.split(".")[0] not in columns:
                continue
            if chunk.total_uncompressed_size > MAX_CHUNK_BYTES or chunk.num_values > MAX_CHUNK_VALUES:
                raise BatchInputInvalid(
                    name,
                    f"row group {number} holds more than {MAX_CHUNK_BYTES} bytes or {MAX_CHUNK_VALUES} values "
                    f"of {one_line(chunk.path_in_schema)}; write smaller row groups",
                )
        if group.num_rows < 0 or total > metadata.num_rows:
            break
    if total != metadata.num_rows:
        raise BatchInputInvalid(name, "has row groups that do not add up to its number of rows")
    return first_rows
