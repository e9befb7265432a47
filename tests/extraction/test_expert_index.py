"""The index of experts: damage, hostile rows and hostile schemas are refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extraction import expert_index
from extraction.errors import ExtractionError, ManifestInvalid
from extraction.expert_index import INDEX_NAME, INDEX_SCHEMA, read_expert_index
from extraction.manifest import MANIFEST_NAME, read_manifest


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    """A store to be damaged."""
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def _replace_index(store: Path, table: pa.Table, *, with_arrow_schema: bool = False) -> None:
    """Another index, with a hash in the manifest that fits it."""
    pq.write_table(table, store / INDEX_NAME, store_schema=with_arrow_schema)
    _accept_index(store)


def _accept_index(store: Path) -> None:
    """Put the hash of the index that is there into the manifest."""
    raw = (store / INDEX_NAME).read_bytes()
    manifest = json.loads((store / MANIFEST_NAME).read_text())
    manifest["files"][INDEX_NAME] = {"nbytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (store / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_altered_index_is_refused_before_it_is_parsed(store: Path) -> None:
    raw = bytearray((store / INDEX_NAME).read_bytes())
    raw[len(raw) // 2] ^= 1
    (store / INDEX_NAME).write_bytes(raw)
    with pytest.raises(ManifestInvalid, match="does not match the hash"):
        read_expert_index(store, read_manifest(store))


def test_index_with_an_extension_type_is_refused(store: Path) -> None:
    class Canary(pa.ExtensionType):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(pa.string(), "test.canary")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Canary:
            raise AssertionError("the extension type was built")

    column = pa.ExtensionArray.from_storage(Canary(), pa.array(["model"]))
    rows = pa.Table.from_pylist(
        [{"component": "x", "layer": 0, "expert": 0, "dtype": "float32", "sha256": None, "parts": []}],
        schema=INDEX_SCHEMA,
    )
    pa.register_extension_type(Canary())
    try:
        _replace_index(store, rows.set_column(0, "component", column), with_arrow_schema=True)
        with pytest.raises(ManifestInvalid, match="other columns"):
            read_expert_index(store, read_manifest(store))
    finally:
        pa.unregister_extension_type("test.canary")


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row.update(dtype="int8"),
        lambda row: row["parts"][0].update(file="../../etc/passwd"),
        lambda row: row["parts"][0].update(offset=-4096),
        lambda row: row["parts"][0].update(nbytes=1 << 62),
        lambda row: [part.update(nbytes=1 << 62) for part in row["parts"]],
        lambda row: [part.update(nbytes=3) for part in row["parts"]],
        lambda row: row["parts"][0].update(offset=(1 << 63) - 1),
        lambda row: row["parts"][0].update(file="a\nb"),
        lambda row: row.update(layer=-1),
        lambda row: row.update(expert=-1),
        lambda row: row.update(component="x" * 5000),
        lambda row: row.update(sha256=None),
        lambda row: row.update(sha256=""),
        lambda row: row.update(parts=[None, None, None]),
        lambda row: row["parts"].pop(),
        lambda row: row["parts"].reverse(),
    ],
)
def test_index_row_that_no_extraction_writes_is_refused(
    store: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    rows = pq.read_table(store / INDEX_NAME).to_pylist()
    damage(rows[3])
    _replace_index(store, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    with pytest.raises(ExtractionError):
        read_expert_index(store, read_manifest(store))


def test_few_bytes_that_stand_for_very_many_rows_are_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal rows take hardly any space in the file, and all of it in memory."""
    monkeypatch.setattr(expert_index, "MAX_INDEX_ROWS", 10_000)
    table = pq.read_table(store / INDEX_NAME)
    _replace_index(store, pa.concat_tables([table.slice(0, 1)] * 10_001).combine_chunks())
    assert (store / INDEX_NAME).stat().st_size < 1 << 16
    with pytest.raises(ManifestInvalid, match="more than"):
        read_expert_index(store, read_manifest(store))


@pytest.mark.parametrize("offset", [60, 200, 500])
def test_damaged_page_with_a_fitting_hash_is_refused_not_a_crash(store: Path, offset: int) -> None:
    raw = bytearray((store / INDEX_NAME).read_bytes())
    raw[offset : offset + 40] = bytes(40)
    (store / INDEX_NAME).write_bytes(raw)
    _accept_index(store)
    with pytest.raises(ManifestInvalid) as caught:
        read_expert_index(store, read_manifest(store))
    assert str(caught.value).isprintable()


def test_index_that_lists_an_expert_twice_is_refused(store: Path) -> None:
    rows = pq.read_table(store / INDEX_NAME).to_pylist()
    _replace_index(store, pa.Table.from_pylist([*rows, rows[0]], schema=INDEX_SCHEMA))
    with pytest.raises(ManifestInvalid, match="twice"):
        read_expert_index(store, read_manifest(store))
