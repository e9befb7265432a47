"""Reads a routing trace (docs/trace-format.md) into arrays, checked: a trace may come from anybody.

Called by `router.replay`, by the evaluation's plots, and by whoever studies routing in Python.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from extraction.errors import ExtractionError
from extraction.expert_index import ARROW_SCHEMA_KEY
from extraction.files import open_regular
from router.errors import TraceInvalid
from router.trace_file import FOOTER_KEY, FORMAT_VERSION, TraceFacts, trace_schema

MAX_FOOTER_BYTES = 64 << 20
MAX_TRACE_ROWS = 1 << 27
MAX_TRACE_BYTES = 16 << 30
"""Of all columns, decompressed."""
MAX_EXPERTS = 1 << 15
MAGIC = b"PAR1"


@dataclass(frozen=True)
class RoutingTable:
    """N rows, one for each token and layer, in the order in which they were routed. A token that was computed again
    (after a preemption) has its rows again."""

    facts: TraceFacts
    names: tuple[str, ...]
    """Requests, in the order in which they first appear."""
    requests_N: np.ndarray
    """int32, into `names`."""
    positions_N: np.ndarray
    """int32, in prompt and answer together."""
    layers_N: np.ndarray
    """int16."""
    experts_NK: np.ndarray
    """int16, best first; -1 at the last ranks of a token with fewer than K."""
    weights_NK: np.ndarray
    """float32; 0 where there is no expert."""
    tokens_N: np.ndarray | None = None
    """int32, where the trace has them."""


def read_trace(path: Path) -> RoutingTable:
    """A file, or all parts of a folder. Raises TraceInvalid."""
    parts = sorted(path.glob("[!._]*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise TraceInvalid(str(path), "has no parts of a trace")
    tables, all_facts = zip(*map(_read_part, parts), strict=True)
    if any(facts != all_facts[0] for facts in all_facts):
        raise TraceInvalid(str(path), "holds traces of several models or policies; read them one by one")
    if sum(len(table) for table in tables) > MAX_TRACE_ROWS:
        raise TraceInvalid(str(path), f"has more than {MAX_TRACE_ROWS} rows")
    return _to_arrays(pa.concat_tables(tables), all_facts[0], path)


def _read_part(path: Path) -> tuple[pa.Table, TraceFacts]:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            _check_footer(file, path)
            reader = pq.ParquetFile(file, arrow_extensions_enabled=False, page_checksum_verification=True)
            facts = _read_facts(reader.metadata.metadata or {}, path)
            if not reader.schema_arrow.remove_metadata().equals(trace_schema(has_tokens=facts.has_tokens)):
                raise TraceInvalid(str(path), "has other columns than a routing trace")
            _check_size(reader.metadata, path)
            return reader.read(), facts
    except (ExtractionError, pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise TraceInvalid(str(path), f"is no readable trace: {error}") from error


def _check_footer(file: BinaryIO, path: Path) -> None:
    """Refuse a footer whose Arrow schema could run code when it is parsed; see ARROW_SCHEMA_KEY."""
    nbytes = os.fstat(file.fileno()).st_size
    file.seek(max(0, nbytes - 8))
    tail = file.read(8)
    size = int.from_bytes(tail[:4], "little")
    if len(tail) < 8 or tail[4:] != MAGIC or not size <= min(nbytes - 12, MAX_FOOTER_BYTES):
        raise TraceInvalid(str(path), "is no Parquet file, or is cut short")
    file.seek(nbytes - 8 - size)
    if ARROW_SCHEMA_KEY in file.read(size):
        raise TraceInvalid(str(path), "brings an Arrow schema, which a trace has not")
    file.seek(0)


def _check_size(metadata: Any, path: Path) -> None:
    """A few bytes can stand for billions of equal rows."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    num_values = max((chunk.num_values for chunk in chunks), default=0)
    num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks)
    if metadata.num_rows > MAX_TRACE_ROWS or num_values > MAX_TRACE_ROWS or num_bytes > MAX_TRACE_BYTES:
        raise TraceInvalid(str(path), f"has more than {MAX_TRACE_ROWS} rows or {MAX_TRACE_BYTES} bytes")


_KINDS: dict[str, type] = {
    "store": str,
    "component": str,
    "policy": str,
    "num_layers": int,
    "num_experts": int,
    "experts_per_token": int,
    "numerics_class": str,
    "sage_moe": str,
    "has_tokens": bool,
    "format": int,
}


def _read_facts(footer: dict[bytes, bytes], path: Path) -> TraceFacts:
    fields: Any = None
    with suppress(ValueError, RecursionError):
        fields = json.loads(footer.get(FOOTER_KEY, b"null"))
    if not isinstance(fields, dict) or {key: type(value) for key, value in fields.items()} != _KINDS:
        raise TraceInvalid(str(path), "is no routing trace: its footer does not say what it is of")
    facts = TraceFacts(**fields)
    if facts.format != FORMAT_VERSION:
        raise TraceInvalid(str(path), f"has format {facts.format}; this version reads {FORMAT_VERSION}")
    if not (
        1 <= facts.num_layers < 1 << 15 and 1 <= facts.experts_per_token <= facts.num_experts <= MAX_EXPERTS
    ):
        raise TraceInvalid(str(path), "is of a model with no possible number of layers or experts")
    return facts


def _to_arrays(table: pa.Table, facts: TraceFacts, path: Path) -> RoutingTable:
    def check(is_right: Callable[[], Any], reason: str) -> None:
        if len(table) and not bool(np.all(is_right())):
            raise TraceInvalid(str(path), reason)

    if any(column.null_count for column in table.columns):
        raise TraceInvalid(str(path), "leaves values out")
    requests = table["request"].combine_chunks().dictionary_encode()
    positions, layers = table["position"].to_numpy(), table["layer"].to_numpy()
    experts_NK = _padded(table["experts"].combine_chunks(), -1, np.int16, path)
    weights_NK = _padded(table["weights"].combine_chunks(), 0.0, np.float32, path)
    check(lambda: positions >= 0, "has a negative position")
    check(
        lambda: (layers >= 0) & (layers < facts.num_layers),
        f"has a layer that is not below {facts.num_layers}",
    )
    check(lambda: experts_NK < facts.num_experts, f"has an expert that is not below {facts.num_experts}")
    check(lambda: np.isfinite(weights_NK), "has a weight that is no number")
    is_row_shape_equal = experts_NK.shape == weights_NK.shape
    check(lambda: is_row_shape_equal, "has rows with more experts than weights, or fewer")
    ordered_NK = np.sort(experts_NK, axis=1)
    check(lambda: (np.diff(ordered_NK) > 0) | (ordered_NK[:, 1:] < 0), "has a row with one expert twice")
    return RoutingTable(
        facts,
        tuple(requests.dictionary.to_pylist()),
        requests.indices.to_numpy(),
        positions,
        layers,
        experts_NK,
        weights_NK,
        table["token"].to_numpy() if facts.has_tokens else None,
    )


def _padded(lists: pa.ListArray, filler: float, dtype: type, path: Path) -> np.ndarray:
    """(N, K) values of N lists, the shorter ones filled up to the longest."""
    lengths = np.diff(lists.offsets.to_numpy())
    longest = int(lengths.max(initial=1))
    if len(lengths) and not 1 <= int(lengths.min()) <= longest <= MAX_EXPERTS:
        raise TraceInvalid(str(path), "has a row without experts")
    if len(lengths) * longest > MAX_TRACE_ROWS:
        raise TraceInvalid(str(path), f"has more than {MAX_TRACE_ROWS} experts")
    padded_NK: np.ndarray = np.full((len(lengths), longest), filler, dtype=dtype)
    padded_NK[np.arange(longest) < lengths[:, None]] = lists.flatten().to_numpy()
    return padded_NK
