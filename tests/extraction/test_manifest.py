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

from extraction import manifest
from extraction.errors import ExtractionError, ManifestInvalid, PathRefused
from extraction.manifest import (
    INDEX_NAME,
    INDEX_SCHEMA,
    MANIFEST_NAME,
    check_files,
    read_expert_index,
    read_manifest,
)


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
    _edit(store, lambda table: table["files"].update({INDEX_NAME: entry}))


INT8 = {"scheme": "int8", "group_size": None}


def _quantised_tensor(table: dict[str, Any], name: str) -> None:
    """As if the backbone had been quantised, that tensor with it, and its bytes were still those of a float dtype."""
    table.update(format_version=3, head_quantization=INT8, backbone_quantization=INT8)
    next(tensor for tensor in table["components"][0]["tensors"] if tensor["name"] == name)["dtype"] = "int8"


def test_manifest_round_trips(store: Path) -> None:
    read = read_manifest(store)
    assert (read.family, read.kind, read.source_root) == ("qwen3_moe", "copied", None)
    assert len(read_expert_index(store, read)) == 16


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: m.update(format_version=4), "format version 4; this program reads 1 to 3"),
        (lambda m: m.update(format_version=3), "what is quantised"),
        (lambda m: m.update(format_version=2), "what is quantised"),
        (lambda m: m.update(quantization=INT8), "what is quantised"),
        (lambda m: m.update(head_quantization=INT8), "what is quantised"),
        (lambda m: m.update(format_version=2, quantization=INT8, backbone_quantization=INT8), "quantised"),
        (lambda m: m["components"][0]["tensors"][0].update(dtype="int8"), "does not say of it"),
        (lambda m: _quantised_tensor(m, "lm_head.weight"), "do not hold"),
        (lambda m: _quantised_tensor(m, "norm.weight"), "does not say of it"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("family"), "family"),
        (lambda m: m["components"][0]["tensors"][0].update(file="../x"), "leads out"),
        (lambda m: m["components"][0]["tensors"][0].update(offset=-1), "offset"),
        (lambda m: m["components"][0]["tensors"][0].update(offset=1 << 63), "offset"),
        (lambda m: m["components"][0]["tensors"][0].update(shape=[1 << 40]), "do not hold"),
        (lambda m: m["components"][0]["tensors"][0].update(shape=[1 << 59] * 1000), "shape"),
        (lambda m: m["components"][0]["tensors"][0].update(shape=[-2, -4]), "shape"),
        (lambda m: m["components"][0]["tensors"][0].update(sha256=None), "without a hash"),
        (lambda m: m["components"][0]["tensors"][0].update(sha256=""), "sha256"),
        (lambda m: m["components"][0]["tensors"][0].update(file="a\x1b[31m"), "control characters"),
        (lambda m: m["components"][0]["tensors"][0].update(file="a" * 2000), "too long"),
        (lambda m: m["components"][0]["tensors"].append(m["components"][0]["tensors"][0]), "twice"),
        (lambda m: m["components"].append(m["components"][0]), "a component twice"),
        (lambda m: m["components"][0].update(name="x y"), "name"),
        (lambda m: m.update(source_root="/tmp"), "does not use"),
        (lambda m: m.update(kind="indexed"), "names no folder"),
        (lambda m: m.update(kind="indexed", source_root="relative"), "no absolute path"),
        (lambda m: m.update({"x\n\x1b" * 1000: 1}), "Extra inputs"),
        (lambda m: m["files"].update({"/etc/passwd": {"nbytes": 1, "sha256": "0" * 64}}), "leads out"),
    ],
)
def test_manifest_that_no_extraction_writes_is_refused(
    store: Path, edit: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    _edit(store, edit)
    with pytest.raises(ManifestInvalid, match=reason) as caught:
        read_manifest(store)
    assert str(caught.value).isprintable()


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


def test_listed_file_behind_a_folder_that_links_out_is_refused(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (store / "folder").symlink_to(outside)
    entry = {"nbytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    _edit(store, lambda table: table["files"].update({"folder/secret": entry}))
    with pytest.raises(PathRefused, match="leads out"):
        check_files(store, read_manifest(store))


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
    monkeypatch.setattr(manifest, "MAX_INDEX_ROWS", 10_000)
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
    entry = {"nbytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    _edit(store, lambda table: table["files"].update({INDEX_NAME: entry}))
    with pytest.raises(ManifestInvalid) as caught:
        read_expert_index(store, read_manifest(store))
    assert str(caught.value).isprintable()


def test_index_that_lists_an_expert_twice_is_refused(store: Path) -> None:
    rows = pq.read_table(store / INDEX_NAME).to_pylist()
    _replace_index(store, pa.Table.from_pylist([*rows, rows[0]], schema=INDEX_SCHEMA))
    with pytest.raises(ManifestInvalid, match="twice"):
        read_expert_index(store, read_manifest(store))
