"""The expert store's own description: `manifest.json` and the index of experts in `experts.parquet`.

Owns both formats (docs/store-format.md), reading and writing. Nothing in them is trusted before it was checked:
schema, version, ranges, and that every path stays inside its folder. Read by `experts.store`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from extraction.errors import ManifestInvalid
from extraction.files import read_small_file

FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "experts.parquet"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
ROLES = ("gate", "up", "down")
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}

ARROW_SCHEMA_KEY = b"ARROW:schema"
"""Key in a Parquet footer whose value can name extension types. Reading such a footer runs the code of any type of
that name that is registered in the process, and some unpickle what the file holds: an index has none."""

Dtype = Literal["bfloat16", "float16", "float32"]


class ExpertKey(NamedTuple):
    """One expert, everywhere: the thinker's and the talker's layer 3 are different experts."""

    component: str
    layer: int
    expert: int


@dataclass(frozen=True)
class RecordPart:
    """One projection's bytes. `offset` counts from the start of the file."""

    role: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExpertRecord:
    """Where one expert lies: gate, up and down, each [out, in] row-major."""

    key: ExpertKey
    dtype: str
    sha256: str | None
    """Of the three parts' bytes in order; None in an index over original shards."""
    parts: tuple[RecordPart, RecordPart, RecordPart]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def is_contiguous(self) -> bool:
        """Whether one read loads it."""
        gate, up, down = self.parts
        is_one_file = gate.file == up.file == down.file
        return is_one_file and gate.offset + gate.nbytes == up.offset and up.offset + up.nbytes == down.offset


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Model):
    """A backbone tensor under its canonical name, and where its bytes are."""

    name: str
    source: str
    """Its name in the checkpoint."""
    file: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int = Field(ge=0)
    nbytes: int = Field(ge=0)
    sha256: str | None

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        return check_relative(value)


class Component(_Model):
    """One decoder of the model with its own layers and experts."""

    name: str
    config: dict[str, Any]
    tensors: tuple[TensorEntry, ...]


class FileEntry(_Model):
    """A file that the store holds whole."""

    nbytes: int = Field(ge=0)
    sha256: str


class Manifest(_Model):
    """What `manifest.json` holds."""

    format_version: Literal[1]
    family: str
    kind: Literal["copied", "indexed"]
    source_root: str | None
    """Absolute folder of the original shards; only in an index over them."""
    config: dict[str, Any]
    generation_config: dict[str, Any]
    components: tuple[Component, ...]
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in value:
            check_relative(name)
        return value


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


def check_relative(path: str) -> str:
    """The path itself, if it is relative and stays inside. Raises ValueError."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leads out of its folder")
    return path


def read_manifest(root: Path) -> Manifest:
    """Raises ManifestInvalid, or PathRefused when it is no regular file."""
    raw = read_small_file(root / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    try:
        version = json.loads(raw).get("format_version")
        if version != FORMAT_VERSION:
            raise ManifestInvalid(
                MANIFEST_NAME, f"format version {version!r}; this program reads {FORMAT_VERSION}"
            )
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ManifestInvalid(MANIFEST_NAME, f"{where}: {first['msg']}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ManifestInvalid(MANIFEST_NAME, "is not a JSON object of a store") from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    text = manifest.model_dump_json(indent=1)
    (root / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def store_hash(root: Path) -> str:
    """SHA-256 of the manifest, in hex: it names the store, since the manifest holds all other hashes."""
    return hashlib.sha256(read_small_file(root / MANIFEST_NAME, MAX_MANIFEST_BYTES)).hexdigest()


def check_files(root: Path, manifest: Manifest) -> None:
    """Raises ManifestInvalid when a file that the store holds whole is not the one that was written."""
    for name, entry in manifest.files.items():
        raw = read_small_file(root / name, MAX_MANIFEST_BYTES)
        if len(raw) != entry.nbytes or hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise ManifestInvalid(name, "does not match the hash in the manifest")


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
    path = root / INDEX_NAME
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    pq.write_table(table, path, compression="zstd", store_schema=False)
    raw = path.read_bytes()
    return FileEntry(nbytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def read_expert_index(root: Path, manifest: Manifest) -> dict[ExpertKey, ExpertRecord]:
    """All records by key. Hash and schema are checked before a row is read. Raises ManifestInvalid."""
    if INDEX_NAME not in manifest.files:
        raise ManifestInvalid(MANIFEST_NAME, f"does not list {INDEX_NAME}")
    check_files(root, manifest.model_copy(update={"files": {INDEX_NAME: manifest.files[INDEX_NAME]}}))
    raw = read_small_file(root / INDEX_NAME, MAX_MANIFEST_BYTES)
    if ARROW_SCHEMA_KEY in raw:
        raise ManifestInvalid(
            INDEX_NAME, "has other columns than an index of experts: it brings an Arrow schema"
        )
    try:
        reader = pq.ParquetFile(pa.BufferReader(raw), arrow_extensions_enabled=False)
        schema = reader.schema_arrow.remove_metadata()
        if not schema.equals(INDEX_SCHEMA):
            raise ManifestInvalid(INDEX_NAME, "has other columns than an index of experts")
        rows = reader.read().to_pylist()
        records = [_record(row) for row in rows]
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise ManifestInvalid(INDEX_NAME, f"cannot be read: {str(error).splitlines()[0]}") from error
    index = {record.key: record for record in records}
    if len(index) != len(records):
        raise ManifestInvalid(INDEX_NAME, "lists an expert twice")
    return index


def _record(row: dict[str, Any]) -> ExpertRecord:
    """Raises ValueError for what no extraction writes."""
    key = ExpertKey(row["component"], row["layer"], row["expert"])
    parts = tuple(
        RecordPart(part["role"], check_relative(part["file"]), part["offset"], part["nbytes"])
        for part in row["parts"]
    )
    if row["dtype"] not in ITEM_SIZES or tuple(part.role for part in parts) != ROLES:
        raise ValueError(f"expert {key} has dtype {row['dtype']!r} or parts other than {ROLES}")
    if any(part.offset < 0 or part.nbytes <= 0 for part in parts):
        raise ValueError(f"expert {key} has a part with a negative offset or no bytes")
    if len({part.nbytes for part in parts}) != 1:
        raise ValueError(f"expert {key} has parts of different sizes")
    return ExpertRecord(key, row["dtype"], row["sha256"], (parts[0], parts[1], parts[2]))
