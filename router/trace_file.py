"""A routing trace as a Parquet file (docs/trace-format.md): its columns, its footer, and a writer whose file appears
whole under its name or not at all. Called by `router.trace`; read by `router.trace_reader`.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from router.errors import TraceFailed

FORMAT_VERSION = 1
FOOTER_KEY = b"sage-moe.trace"
TOKEN = pa.field("token", pa.int32(), nullable=False)


@dataclass(frozen=True)
class TraceFacts:
    """What a trace's footer says of the run that it was made in."""

    store: str
    """SHA-256 of the store's manifest, in hex."""
    component: str
    policy: str
    """`native`, or what replaced the checkpoint's routing."""
    num_layers: int
    num_experts: int
    experts_per_token: int
    """Of the checkpoint."""
    numerics_class: str
    sage_moe: str
    """Version of this program."""
    has_tokens: bool = False
    """Whether there is a column `token`."""
    format: int = FORMAT_VERSION


def trace_schema(*, has_tokens: bool) -> pa.Schema:
    """One row for each token and layer; see docs/trace-format.md."""
    fields = [
        pa.field("request", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("experts", pa.list_(pa.field("element", pa.int16(), nullable=False)), nullable=False),
        pa.field("weights", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
    ]
    return pa.schema([*fields, TOKEN] if has_tokens else fields)


class TraceFile:
    """One file while it is written. Use it from one thread."""

    def __init__(self, path: Path, facts: TraceFacts) -> None:
        """Raises TraceFailed."""
        self.path, self.num_rows = path, 0
        self._facts = facts
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if path.is_dir():
            raise TraceFailed(str(path), "is a folder")
        try:
            self._file = open(self._temporary, "xb")  # noqa: SIM115 - closed by finish or discard
        except OSError as error:
            raise TraceFailed(str(path), error.strerror or str(error)) from error
        schema = trace_schema(has_tokens=facts.has_tokens)
        self._writer: Any = pq.ParquetWriter(self._file, schema, compression="zstd", store_schema=False)

    def write(self, rows: pa.RecordBatch) -> None:
        """One row group. Raises OSError."""
        self._writer.write_batch(rows, row_group_size=max(1, rows.num_rows))
        self.num_rows += rows.num_rows

    def finish(self) -> None:
        """Give the file its name. Raises OSError."""
        self._writer.add_key_value_metadata({FOOTER_KEY: json.dumps(asdict(self._facts))})
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Leave nothing behind. What is buffered is written by closing, which may be refused again, and closes."""
        with suppress(OSError, pa.ArrowException):
            self._writer.close()
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            os.unlink(self._temporary)
