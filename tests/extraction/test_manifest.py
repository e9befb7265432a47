"""Manifest and index: damage, other versions and paths that lead out are refused by name."""

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

from extraction.errors import ExtractionError, ManifestInvalid, PathRefused
from extraction.manifest import INDEX_NAME, INDEX_SCHEMA, MANIFEST_NAME, read_expert_index, read_manifest


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    """A store to be damaged."""
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def _edit(store: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads((store / MANIFEST_NAME).read_text())
    edit(table)
    (store / MANIFEST_NAME).write_text(json.dumps(table))


def _replace_index(store: Path, table: pa.Table, *, with_arrow_schema: bool = False) -> None:
    """Another index, with a hash in the manifest that fits it."""
    pq.write_table(table, store / INDEX_NAME, store_schema=with_arrow_schema)
    raw = (store / INDEX_NAME).read_bytes()
    entry = {"nbytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    _edit(store, lambda manifest: manifest["files"].update({INDEX_NAME: entry}))


def test_manifest_round_trips(store: Path) -> None:
    manifest = read_manifest(store)
    assert (manifest.family, manifest.kind, manifest.source_root) == ("qwen3_moe", "copied", None)
    assert len(read_expert_index(store, manifest)) == 16


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: m.update(format_version=2), "format version 2; this program reads 1"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("family"), "family"),
        (lambda m: m["components"][0]["tensors"][0].update(file="../x"), "leads out"),
        (lambda m: m["components"][0]["tensors"][0].update(offset=-1), "offset"),
        (lambda m: m["files"].update({"/etc/passwd": {"nbytes": 1, "sha256": ""}}), "leads out"),
    ],
)
def test_manifest_that_no_extraction_writes_is_refused(
    store: Path, edit: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    _edit(store, edit)
    with pytest.raises(ManifestInvalid, match=reason):
        read_manifest(store)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_no_json_object_is_refused(store: Path, content: bytes) -> None:
    (store / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ManifestInvalid):
        read_manifest(store)


def test_manifest_that_is_a_link_out_is_refused(store: Path, tmp_path: Path) -> None:
    (store / MANIFEST_NAME).rename(tmp_path / "elsewhere.json")
    (store / MANIFEST_NAME).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PathRefused):
        read_manifest(store)


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


def test_index_that_lists_an_expert_twice_is_refused(store: Path) -> None:
    rows = pq.read_table(store / INDEX_NAME).to_pylist()
    _replace_index(store, pa.Table.from_pylist([*rows, rows[0]], schema=INDEX_SCHEMA))
    with pytest.raises(ManifestInvalid, match="twice"):
        read_expert_index(store, read_manifest(store))
