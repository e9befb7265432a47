"""The index of experts, `experts.parquet`: where each expert's record lies.

Owns the format (docs/store-format.md), reading and writing. Nothing in it is trusted before it was checked: the hash in
the manifest, schema, number of rows, ranges, and that every path stays inside its folder. Read by `experts.store`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from extraction.errors import ManifestInvalid
from extraction.files import read_small_file
from extraction.manifest import (
    ITEM_SIZES,
    MANIFEST_NAME,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    NAME_PATTERN,
    ROLES,
    SCALE_ROLES,
    SHA256_PATTERN,
    ExpertKey,
    ExpertRecord,
    FileEntry,
    Manifest,
    RecordPart,
    check_files,
    check_relative,
)
from extraction.quantise import Quantization

INDEX_NAME = "experts.parquet"
MAX_INDEX_ROWS = 1 << 20
ARROW_SCHEMA_KEY = b"ARROW:schema"
"""Key in a Parquet footer whose value can name extension types. Reading such a footer runs the code of any type of
that name that is registered in the process, and some unpickle what the file holds: an index has none."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field("component", pa.string(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("expert", pa.int32(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field(
            "parts",
            pa.list_(
                pa.struct(
                    [
                        pa.field("role", pa.string(), nullable=False),
                        pa.field("file", pa.string(), nullable=False),
                        pa.field("offset", pa.int64(), nullable=False),
                        pa.field("nbytes", pa.int64(), nullable=False),
                    ]
                )
            ),
            nullable=False,
        ),
    ]
)


def write_expert_index(root: Path, records: Iterable[ExpertRecord]) -> FileEntry:
    """Write `experts.parquet`, sorted by key. Returns its entry for the manifest."""
    rows = [
        {
            "component": record.key.component,
            "layer": record.key.layer,
            "expert": record.key.expert,
            "dtype": record.dtype,
            "sha256": record.sha256,
            "parts": [
                {"role": part.role, "file": part.file, "offset": part.offset, "nbytes": part.nbytes}
                for part in record.parts
            ],
        }
        for record in sorted(records, key=lambda record: record.key)
    ]
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", store_schema=False)
    raw = buffer.getvalue()
    (root / INDEX_NAME).write_bytes(raw)
    return FileEntry(nbytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def read_expert_index(root: Path, manifest: Manifest) -> dict[ExpertKey, ExpertRecord]:
    """All records by key. Hash and schema are checked before a row is read. Raises ManifestInvalid."""
    if INDEX_NAME not in manifest.files:
        raise ManifestInvalid(MANIFEST_NAME, f"does not list {INDEX_NAME}")
    check_files(root, manifest.model_copy(update={"files": {INDEX_NAME: manifest.files[INDEX_NAME]}}))
    raw = read_small_file(root, INDEX_NAME, MAX_MANIFEST_BYTES)
    if ARROW_SCHEMA_KEY in raw:
        raise ManifestInvalid(
            INDEX_NAME, "has other columns than an index of experts: it brings an Arrow schema"
        )
    try:
        rows = _rows(raw)
        records = [_record(row, manifest) for row in rows]
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise ManifestInvalid(INDEX_NAME, f"cannot be read: {error}") from error
    index = {record.key: record for record in records}
    if len(index) != len(records):
        raise ManifestInvalid(INDEX_NAME, "lists an expert twice")
    return index


def _rows(raw: bytes) -> list[dict[str, Any]]:
    """Raises ManifestInvalid, or what pyarrow raises."""
    reader = pq.ParquetFile(pa.BufferReader(raw), arrow_extensions_enabled=False)
    schema = reader.schema_arrow.remove_metadata()
    if not schema.equals(INDEX_SCHEMA):
        raise ManifestInvalid(INDEX_NAME, "has other columns than an index of experts")
    # A few bytes can stand for billions of equal rows.
    groups = [reader.metadata.row_group(number) for number in range(reader.num_row_groups)]
    num_values = max(
        (group.column(column).num_values for group in groups for column in range(group.num_columns)),
        default=0,
    )
    if reader.metadata.num_rows > MAX_INDEX_ROWS or num_values > len(ROLES + SCALE_ROLES) * MAX_INDEX_ROWS:
        raise ManifestInvalid(INDEX_NAME, f"has more than {MAX_INDEX_ROWS} rows")
    # A short command can end while pyarrow still starts its threads, and then aborts at exit.
    rows: list[dict[str, Any]] = reader.read(use_threads=False).to_pylist()
    return rows


def _record(row: dict[str, Any], manifest: Manifest) -> ExpertRecord:
    """Raises ValueError for what no extraction writes."""
    key = ExpertKey(row["component"], row["layer"], row["expert"])
    parts = tuple(
        RecordPart(part["role"], check_relative(part["file"]), part["offset"], part["nbytes"])
        for part in row["parts"]
    )
    if not re.fullmatch(NAME_PATTERN, key.component) or key.layer < 0 or key.expert < 0:
        raise ValueError(f"expert {key} has a damaged component's name or a negative number")
    if any(part.offset < 0 or part.nbytes <= 0 for part in parts):
        raise ValueError(f"expert {key} has a part with a negative offset or no bytes")
    if any(part.offset > MAX_FILE_BYTES or part.nbytes > MAX_FILE_BYTES for part in parts):
        raise ValueError(f"expert {key} has a part beyond {MAX_FILE_BYTES} bytes")
    _check_form(key, row["dtype"], parts, manifest.quantization)
    if row["sha256"] is None:
        if manifest.kind == "copied":
            raise ValueError(f"expert {key} is copied without a hash")
    elif not re.fullmatch(SHA256_PATTERN, row["sha256"]):
        raise ValueError(f"expert {key} has a hash that is none")
    return ExpertRecord(key, row["dtype"], row["sha256"], parts)


def _check_form(
    key: ExpertKey, dtype: str, parts: tuple[RecordPart, ...], quantization: Quantization | None
) -> None:
    """Dtype and parts as they belong together. Whether sizes fit a model is for who knows its width."""
    roles = tuple(part.role for part in parts)
    if quantization is not None:
        if dtype != quantization.scheme or roles != ROLES + SCALE_ROLES:
            raise ValueError(f"expert {key} has dtype {dtype!r} or parts other than quantised ones have")
        if parts[0].nbytes != parts[1].nbytes or parts[3].nbytes != parts[4].nbytes:
            raise ValueError(f"expert {key} has a gate and an up projection of different sizes")
        return
    if dtype not in ITEM_SIZES or roles != ROLES:
        raise ValueError(f"expert {key} has dtype {dtype!r} or parts other than {ROLES}")
    if len({part.nbytes for part in parts}) != 1 or parts[0].nbytes % ITEM_SIZES[dtype]:
        raise ValueError(f"expert {key} has parts of different sizes or of no whole number of values")
