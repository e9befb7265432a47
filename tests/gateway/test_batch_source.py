"""Inputs from outside: lines with limits, Parquet with plain types only, files that change or lie."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extraction.errors import PathRefused
from gateway.batch import parquet as batch_parquet
from gateway.batch import source as batch_source
from gateway.batch.plan import PART_ROWS
from gateway.batch.rows import RawRow
from gateway.batch.source import open_rows, plan_input
from gateway.errors import BatchInputInvalid


def _rows(path: Path) -> list[RawRow]:
    planned = plan_input(path)
    with open_rows(planned.path, planned.format, planned.nbytes, planned.mtime_ns) as reader:
        return [row for part in planned.parts for row in reader.rows(part)]


def _refusal(path: Path) -> str:
    with pytest.raises(BatchInputInvalid) as caught:
        _rows(path)
    return str(caught.value)


def _write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_lines_are_rows_but_for_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n\n  \r\n{"b":2}\r\n{"c":3}')
    assert [(row.index, row.line) for row in _rows(path)] == [
        (0, b'{"a":1}'),
        (1, b'{"b":2}'),
        (2, b'{"c":3}'),
    ]


def test_line_above_the_limit_is_an_error_in_its_row_and_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_source, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(batch_source, "PIECE_BYTES", 7)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a" * 100 + b"\n" + b"b" * 5000 + b"\n" + b"c" * 99 + b"\n")
    rows = _rows(path)
    assert [row.line for row in rows] == [None, None, b"c" * 99]
    assert rows[1].error == "The row is longer than 100 bytes."


def test_parts_can_be_read_in_any_order(tmp_path: Path) -> None:
    texts = [f"p{n}" for n in range(2 * PART_ROWS + 10)]
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(f"{text}\n" for text in texts))
    parquet = _write(tmp_path / "rows.parquet", {"prompt": texts}, row_group_size=100)
    for path in (jsonl, parquet):
        planned = plan_input(path)
        with open_rows(planned.path, planned.format, planned.nbytes, planned.mtime_ns) as reader:
            for part in (planned.parts[2], planned.parts[0], planned.parts[1]):
                rows = list(reader.rows(part))
                found = [row.line.decode() if row.line else str((row.fields or {})["prompt"]) for row in rows]
                assert found == texts[part.first_row : part.first_row + part.num_rows]


def test_parquet_columns_become_a_row_without_its_nulls(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    columns = {
        "id": pa.array([1, 2]),
        "prompt": pa.array([None, [1, 2]], pa.list_(pa.int32())),
        "messages": pa.array([turns, None]),
        "max_tokens": pa.array([None, 4.0]),  # as pandas writes whole numbers with gaps
        "temperature": pa.array([0.5, None]),
        "stop": pa.array([["x"], None]),
        "label": pa.array(["a", "b"]),
    }
    path = _write(tmp_path / "rows.parquet", columns)
    first, second = _rows(path)
    assert first.fields == {"id": 1, "messages": turns, "temperature": 0.5, "stop": ["x"]}
    assert second.fields == {"id": 2, "prompt": [1, 2], "max_tokens": 4}
    assert plan_input(path).ignored_columns == ("label",)


def test_text_that_is_not_utf_8_is_an_error_in_its_row(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff"]).buffers())
    rows = _rows(_write(tmp_path / "rows.parquet", {"prompt": bad}))
    assert [row.error for row in rows] == [None, "prompt is not UTF-8."]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": ["a"]}, "neither a column prompt nor a column messages"),
        ({"prompt": [b"a"]}, "column prompt has the type binary"),
        ({"prompt": [[[1]]]}, "column prompt has the type list"),
        ({"prompt": [{"a": "b"}]}, "column prompt has the type struct"),
        ({"prompt": ["a"], "seed": ["1"]}, "column seed has the type string"),
        ({"prompt": ["a"], "max_tokens": pa.array([1], pa.timestamp("s"))}, "column max_tokens has the type"),
        ({"messages": [[{"role": "user", "content": [{"text": "a"}]}]]}, "column messages has the type"),
        ({"messages": [[{"role": "user", "content": "a", "tool": "b"}]]}, "column messages has the type"),
        ({"prompt": ["a"], "logit_bias": ["{}"]}, "column logit_bias is not supported"),
        ({"prompt": pa.array([], pa.string())}, "has 0 rows"),
    ],
)
def test_parquet_of_other_types_is_refused(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    assert reason in _refusal(_write(tmp_path / "rows.parquet", columns))


class Canary(pa.ExtensionType):
    """Stands for a type that unpickles what the file holds."""

    sang = False

    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.canary")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Canary:
        cls.sang = True
        return cls()


@contextmanager
def _registered() -> Iterator[None]:
    pa.register_extension_type(Canary())
    Canary.sang = False
    try:
        yield
    finally:
        pa.unregister_extension_type("tests.canary")


def _canary_column() -> pa.Array:
    return pa.ExtensionArray.from_storage(Canary(), pa.array(["a"]))


@pytest.mark.parametrize("column", ["prompt", "label"])
def test_extension_type_is_refused_and_none_of_its_code_runs(tmp_path: Path, column: str) -> None:
    columns = {"prompt": pa.array(["a"])} | {column: _canary_column()}
    with _registered():
        path = _write(tmp_path / "rows.parquet", columns)
        assert "extension types" in _refusal(path)
        assert not Canary.sang
        pq.read_schema(path)
        assert Canary.sang, "the file would not have harmed any reader"


def test_second_arrow_schema_hides_no_extension_type(tmp_path: Path) -> None:
    """Readers differ in which of two keys they take."""
    hostile = pa.schema([pa.field("prompt", Canary())]).serialize().to_pybytes()
    harmless = pa.schema([pa.field("prompt", pa.string())]).serialize().to_pybytes()
    with _registered():
        for number, schemas in enumerate(((hostile, harmless), (harmless, hostile))):
            path = tmp_path / f"{number}.parquet"
            with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())]), store_schema=False) as writer:
                writer.write_table(pa.table({"prompt": ["a"]}))
                keys = {f"ARROW:schem{n}": base64.b64encode(s) for n, s in enumerate(schemas)}
                writer.add_key_value_metadata(keys)
            raw = path.read_bytes()
            for key in (
                b"ARROW:schem0",
                b"ARROW:schem1",
            ):  # a writer takes a key once; the bytes have it twice
                raw = raw.replace(key, b"ARROW:schema")
            assert raw.count(b"ARROW:schema") == 2
            path.write_bytes(raw)
            _refusal(path)
            assert not Canary.sang


@pytest.mark.parametrize(
    "value", [b"not base64!", b"", b"QUJD\nQUJD", base64.b64encode(b"ARROW:extension:name")]
)
def test_arrow_schema_that_is_none_is_refused(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "rows.parquet"
    with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())]), store_schema=False) as writer:
        writer.write_table(pa.table({"prompt": ["a"]}))
        writer.add_key_value_metadata({"ARROW:schema": value})
    assert "rows.parquet: has" in _refusal(path)


@pytest.mark.parametrize("damage", ["cut", "magic", "footer", "size", "page", "empty"])
def test_damaged_parquet_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = _write(tmp_path / "rows.parquet", {"prompt": [f"row {n}" for n in range(500)]}, compression="zstd")
    raw = bytearray(path.read_bytes())
    size = int.from_bytes(raw[-8:-4], "little")
    if damage == "cut":
        raw = raw[:-20]
    elif damage == "magic":
        raw[-4:] = b"PARE"
    elif damage == "footer":
        raw[-size - 8 : -8] = b"\xff" * size
    elif damage == "size":
        raw[-8:-4] = b"\xff\xff\xff\x7f"
    elif damage == "page":
        raw[40:400] = b"\xff" * 360
    else:
        raw = bytearray()
    path.write_bytes(raw)
    assert _refusal(path).isprintable()


def test_row_groups_too_large_to_decode_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "rows.parquet", {"prompt": [[1] * 1000] * 100, "label": ["x" * 10**6] * 100})
    monkeypatch.setattr(batch_parquet, "MAX_CHUNK_VALUES", 100_000)
    assert len(_rows(path)) == 100
    monkeypatch.setattr(batch_parquet, "MAX_CHUNK_VALUES", 99_999)
    assert "write smaller row groups" in _refusal(path)


def test_parquet_row_above_the_limit_is_an_error_in_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_parquet, "MAX_ROW_CHARS", 10)
    rows = _rows(_write(tmp_path / "rows.parquet", {"prompt": ["a" * 11, "b" * 10]}))
    assert [row.error for row in rows] == ["The row is longer than 10 characters.", None]


def test_input_changed_between_plan_and_work_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    planned = plan_input(path)
    path.write_text('{"prompt": "b"}\n{"prompt": "c"}\n')
    opened = open_rows(planned.path, planned.format, planned.nbytes, planned.mtime_ns)
    with pytest.raises(BatchInputInvalid, match="was changed while the batch ran"), opened:
        pass


def test_what_is_no_input_is_refused(tmp_path: Path) -> None:
    assert "No such file" in _refusal(tmp_path / "none.jsonl")
    (tmp_path / "rows.csv").write_text("prompt\na\n")
    assert "must end in one of .jsonl" in _refusal(tmp_path / "rows.csv")
    os.mkfifo(tmp_path / "fifo.jsonl")
    with pytest.raises(PathRefused, match="not a regular file"):
        plan_input(tmp_path / "fifo.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert "has 0 rows" in _refusal(tmp_path / "blank.jsonl")
