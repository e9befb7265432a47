"""A trace may come from anybody: what is not one is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router.errors import TraceInvalid
from router.trace_file import FOOTER_KEY, TraceFacts, TraceFile, trace_schema
from router.trace_reader import read_trace

FACTS = TraceFacts("0" * 64, "model", "native", 3, 8, 2, "cpu/test", "1.0")
ROW: dict[str, Any] = {"request": "a", "position": 0, "layer": 1, "experts": [1, 2], "weights": [0.5, 0.5]}


def _write(path: Path, rows: list[dict[str, Any]], facts: TraceFacts = FACTS) -> Path:
    file = TraceFile(path, facts)
    schema = trace_schema(has_tokens=facts.has_tokens)
    file.write(pa.RecordBatch.from_pylist(rows, schema))
    file.finish()
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer": 3}, "layer that is not below 3"),
        ({"layer": -1}, "layer that is not below 3"),
        ({"position": -1}, "negative position"),
        ({"experts": [1, 8]}, "expert that is not below 8"),
        ({"experts": [1, 1]}, "one expert twice"),
        ({"experts": [], "weights": []}, "row without experts"),
        ({"weights": [0.5]}, "more experts than weights"),
        ({"weights": [0.5, float("nan")]}, "weight that is no number"),
    ],
)
def test_impossible_row_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(TraceInvalid, match=reason):
        read_trace(_write(tmp_path / "trace.parquet", [ROW | change]))


def test_rows_of_several_lengths_are_filled_up(tmp_path: Path) -> None:
    short = ROW | {"position": 1, "experts": [4], "weights": [1.0]}
    table = read_trace(_write(tmp_path / "trace.parquet", [ROW, short]))
    assert table.experts_NK.tolist() == [[1, 2], [4, -1]]
    assert table.weights_NK.tolist() == [[0.5, 0.5], [1.0, 0.0]]


def test_trace_without_rows_is_read(tmp_path: Path) -> None:
    table = read_trace(_write(tmp_path / "trace.parquet", []))
    assert len(table.positions_N) == 0 and table.names == ()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _text(path: Path) -> None:
    path.write_text("no Parquet file at all")


def _other_columns(path: Path) -> None:
    table = pa.table({"request": ["a"]})
    with pq.ParquetWriter(path, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FOOTER_KEY: json.dumps(asdict(FACTS))})


def _no_footer(path: Path) -> None:
    pq.write_table(pa.table({"request": ["a"]}), path, store_schema=False)


def _arrow_schema(path: Path) -> None:
    pq.write_table(pa.table({"request": ["a"]}), path)


def _pipe(path: Path) -> None:
    import os

    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "cut short"),
        (_text, "no Parquet file"),
        (_other_columns, "other columns"),
        (_no_footer, "no routing trace"),
        (_arrow_schema, "brings an Arrow schema"),
        (_pipe, "not a regular file"),
    ],
)
def test_file_that_is_no_trace_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    path = _write(tmp_path / "trace.parquet", [ROW])
    damage(path)
    with pytest.raises(TraceInvalid, match=reason):
        read_trace(path)


@pytest.mark.parametrize(
    "facts",
    [
        replace(FACTS, format=2),
        replace(FACTS, num_layers=0),
        replace(FACTS, num_experts=1 << 20),
        replace(FACTS, num_layers="3"),  # type: ignore[arg-type]
    ],
)
def test_impossible_footer_is_refused(tmp_path: Path, facts: TraceFacts) -> None:
    with pytest.raises(TraceInvalid):
        read_trace(_write(tmp_path / "trace.parquet", [], facts))


def test_folder_of_two_models_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", [ROW])
    _write(tmp_path / "b.parquet", [ROW], replace(FACTS, store="1" * 64))
    with pytest.raises(TraceInvalid, match="several models"):
        read_trace(tmp_path)


def test_folder_without_parts_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceInvalid, match="no parts"):
        read_trace(tmp_path)
    with pytest.raises(TraceInvalid, match="is missing"):
        read_trace(tmp_path / "none.parquet")
