"""Manifest and index: damage, other versions and paths that lead out are refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extraction.errors import ManifestInvalid, PathRefused
from extraction.expert_index import read_expert_index
from extraction.manifest import MANIFEST_NAME, check_files, read_manifest


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    """A store to be damaged."""
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def _edit(store: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads((store / MANIFEST_NAME).read_text())
    edit(table)
    (store / MANIFEST_NAME).write_text(json.dumps(table))


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
