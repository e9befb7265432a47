"""`--verify` finds every kind of difference between a store and its checkpoint, and names the first."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from extraction.errors import ExtractionError, ManifestInvalid, StoreDiffers
from extraction.expert_index import read_expert_index, write_expert_index
from extraction.extract import extract
from extraction.manifest import ROLES, read_manifest, write_manifest
from extraction.selection import Selection
from extraction.verify import verify


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"index_only": True},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"selection": Selection(layers=frozenset({1}))},
        {"selection": Selection(layers=frozenset({0})), "index_only": True},
    ],
)
def test_store_of_any_kind_holds_its_checkpoint(
    sharded: Path, tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extraction.verify.BUFFER_BYTES", 4096)  # several chunks a tensor
    extract(sharded, tmp_path / "store", **options)  # type: ignore[arg-type]
    calls: list[tuple[int, int]] = []
    report = verify(tmp_path / "store", sharded, progress=lambda done, total: calls.append((done, total)))
    assert report.num_experts == (8 if "selection" in options else 16)
    assert calls[-1] == (report.weight_bytes, report.weight_bytes)
    assert (report.left_out is not None) == ("selection" in options)


@pytest.fixture
def store(sharded: Path, tmp_path: Path) -> Path:
    extract(sharded, tmp_path / "store")
    return tmp_path / "store"


def _flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("distance", [0, 1777, -1])
def test_flipped_bit_of_an_expert_is_named_by_tensor_file_and_offset(
    store: Path, sharded: Path, role: str, distance: int
) -> None:
    index = read_expert_index(store, read_manifest(store))
    key = sorted(index)[11]
    part = index[key].parts[ROLES.index(role)]
    offset = part.offset + distance % part.nbytes
    _flip(store / part.file, offset)
    with pytest.raises(StoreDiffers) as caught:
        verify(store, sharded)
    error = caught.value
    assert error.tensor == f"model.layers.{key.layer}.mlp.experts.{key.expert}.{role}_proj.weight"
    assert (error.file, error.offset) == (part.file, offset)


def test_flipped_bit_of_any_backbone_tensor_is_named(store: Path, sharded: Path) -> None:
    for entry in read_manifest(store).components[0].tensors:
        _flip(store / entry.file, entry.offset + entry.nbytes - 1)
        with pytest.raises(StoreDiffers) as caught:
            verify(store, sharded)
        _flip(store / entry.file, entry.offset + entry.nbytes - 1)
        assert (caught.value.tensor, caught.value.offset) == (entry.source, entry.offset + entry.nbytes - 1)
    verify(store, sharded)


def _rewrite(store: Path, change: Callable[[list], list]) -> None:  # type: ignore[type-arg]
    """Change the index, and make the manifest agree."""
    manifest = read_manifest(store)
    records = [record for _, record in sorted(read_expert_index(store, manifest).items())]
    entry = write_expert_index(store, change(records))
    files = dict(manifest.files) | {"experts.parquet": entry}
    write_manifest(store, manifest.model_copy(update={"files": files}))


def test_expert_that_the_store_lacks_is_named(store: Path, sharded: Path) -> None:
    """What a reader of the store alone cannot see: the last expert of every layer is gone."""
    _rewrite(store, lambda records: [record for record in records if record.key.expert != 7])
    with pytest.raises(
        StoreDiffers, match=r"layers\.0\.mlp\.experts\.7\.gate_proj\.weight: experts\.parquet"
    ):
        verify(store, sharded)


def test_experts_that_were_swapped_are_found_although_hashes_fit(store: Path, sharded: Path) -> None:
    def swap(records: list) -> list:  # type: ignore[type-arg]
        first, second, *rest = records
        return [
            type(first)(first.key, second.dtype, second.sha256, second.parts),
            type(first)(second.key, first.dtype, first.sha256, first.parts),
            *rest,
        ]

    _rewrite(store, swap)
    with pytest.raises(StoreDiffers, match=r"experts\.0\.gate_proj"):
        verify(store, sharded)


def test_wrong_hash_of_right_bytes_is_found(store: Path, sharded: Path) -> None:
    def forge(records: list) -> list:  # type: ignore[type-arg]
        first, *rest = records
        return [type(first)(first.key, first.dtype, "0" * 64, first.parts), *rest]

    _rewrite(store, forge)
    with pytest.raises(StoreDiffers, match="recorded hash is not"):
        verify(store, sharded)


def test_backbone_tensor_that_the_store_lacks_is_named(store: Path, sharded: Path) -> None:
    manifest = read_manifest(store)
    (component,) = manifest.components
    fewer = component.model_copy(update={"tensors": component.tensors[1:]})
    write_manifest(store, manifest.model_copy(update={"components": (fewer,)}))
    with pytest.raises(StoreDiffers) as caught:
        verify(store, sharded)
    assert caught.value.tensor == component.tensors[0].source


def test_store_cut_short_is_one_error(store: Path, sharded: Path) -> None:
    path = max((store / "experts").iterdir())
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ExtractionError, match=r"cut short"):
        verify(store, sharded)


def test_changed_checkpoint_is_another_one(store: Path, copy: Path) -> None:
    shard = max(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    name = max(tensors)
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, shard)
    with pytest.raises(StoreDiffers) as caught:
        verify(store, copy)
    assert caught.value.tensor == name


def test_other_configuration_is_found(store: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(ManifestInvalid, match="another one than the checkpoint's"):
        verify(store, copy)


def test_same_tensors_in_other_shards_are_the_same_checkpoint(store: Path, sharded: Path, copy: Path) -> None:
    """Where shard boundaries fall does not matter."""
    tensors = {}
    for shard in copy.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (copy / "model.safetensors.index.json").unlink()
    save_file(dict(sorted(tensors.items(), reverse=True)), copy / "model.safetensors")
    assert verify(store, copy).num_experts == 16
    extract(copy, copy.parent / "other")
    files = [
        sorted(
            (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in (root / "experts").iterdir()
        )
        for root in (store, copy.parent / "other")
    ]
    assert files[0] == files[1]
    shutil.rmtree(copy.parent / "other")
