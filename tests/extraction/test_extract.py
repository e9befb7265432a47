"""Checkpoint in, store out: bytes and hashes of the original, or a clear refusal with nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experts.store import ExpertStore
from extraction import atomic_folder
from extraction.errors import (
    CheckpointDamaged,
    DestinationOccupied,
    DiskFull,
    ExtractionError,
    FamilyUnknown,
    PathRefused,
    TensorsMissing,
)
from extraction.extract import extract
from extraction.manifest import ROLES, read_expert_index, read_manifest
from extraction.plan import SHARD_INDEX
from tests.checkpoints import write_tiny_qwen3_moe


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in many shards, so that some expert's projections lie in different ones."""
    root = write_tiny_qwen3_moe(tmp_path_factory.mktemp("sharded") / "checkpoint", shard_size="20KB")
    weight_map = json.loads((root / SHARD_INDEX).read_text())["weight_map"]
    homes = {
        (layer, expert): {
            weight_map[f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"] for role in ROLES
        }
        for layer in range(2)
        for expert in range(8)
    }
    assert any(len(files) > 1 for files in homes.values()), "no expert straddles two shards"
    return root


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """The sharded checkpoint, to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


@pytest.mark.parametrize("index_only", [False, True])
def test_store_holds_every_tensor_of_a_sharded_checkpoint(
    sharded: Path, tmp_path: Path, index_only: bool
) -> None:
    report = extract(sharded, tmp_path / "store", index_only=index_only)
    source = _tensors(sharded)
    store = ExpertStore.open(tmp_path / "store")
    assert (report.num_layers, report.num_experts) == (2, 16) == (2, len(store.expert_keys()))
    assert report.weight_bytes == sum(tensor.numel() * 4 for tensor in source.values())
    for key in store.expert_keys():
        names = [f"model.layers.{key.layer}.mlp.experts.{key.expert}.{role}_proj.weight" for role in ROLES]
        expected = torch.cat([source.pop(name).reshape(-1) for name in names])
        assert torch.equal(store.read_expert(key).view(torch.float32), expected)
    for entry in store.component("model").tensors:
        assert torch.equal(store.read_tensor("model", entry.name), source.pop(entry.source))
    assert not source
    store.close()


def test_copied_records_are_contiguous_aligned_and_hashed(sharded: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    extract(sharded, root)
    for record in read_expert_index(root, read_manifest(root)).values():
        assert record.is_contiguous
        assert record.parts[0].offset % 4096 == 0
        raw = (root / record.parts[0].file).read_bytes()[record.parts[0].offset :][: record.nbytes]
        assert hashlib.sha256(raw).hexdigest() == record.sha256


def test_files_of_a_store_open_with_the_safetensors_library(sharded: Path, tmp_path: Path) -> None:
    extract(sharded, tmp_path / "store")
    source = _tensors(sharded)
    with safe_open(tmp_path / "store/experts/model-layer-0001.safetensors", "pt") as file:
        names = list(file.keys())
        gate = file.get_tensor("layers.1.experts.5.gate")
    assert torch.equal(gate, source["model.layers.1.mlp.experts.5.gate_proj.weight"])
    assert any(name.startswith("padding.") for name in names)


def test_small_files_are_carried_whole(sharded: Path, tmp_path: Path) -> None:
    extract(sharded, tmp_path / "store")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "store" / name).read_bytes() == (sharded / name).read_bytes()
        assert name in read_manifest(tmp_path / "store").files


def test_extraction_is_deterministic(sharded: Path, tmp_path: Path) -> None:
    extract(sharded, tmp_path / "a")
    extract(sharded, tmp_path / "b")
    assert ExpertStore.open(tmp_path / "a").hash == ExpertStore.open(tmp_path / "b").hash


def test_progress_counts_up_to_all_bytes(sharded: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = extract(sharded, tmp_path / "store", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (report.weight_bytes, report.weight_bytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def _edit_json(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


def _without_tensor(copy: Path, name: str) -> None:
    """Remove a tensor from its shard and from the index, as a wrongly split checkpoint would lack it."""
    index = json.loads((copy / SHARD_INDEX).read_text())
    shard = copy / index["weight_map"].pop(name)
    (copy / SHARD_INDEX).write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)


def _first_shard(copy: Path) -> Path:
    return min(copy.glob("*.safetensors"))


def _refused(copy: Path, kind: type[ExtractionError], *words: str) -> None:
    dest = copy.parent / "out" / "store"
    with pytest.raises(kind) as caught:
        extract(copy, dest)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not dest.exists()
    assert not dest.parent.exists() or not list(dest.parent.iterdir())


def test_missing_expert_is_named(copy: Path) -> None:
    _without_tensor(copy, "model.layers.1.mlp.experts.3.up_proj.weight")
    _refused(copy, TensorsMissing, "layer 1 expert 3 up", "1 tensors are missing")


def test_missing_shard_is_named(copy: Path) -> None:
    _first_shard(copy).unlink()
    _refused(copy, CheckpointDamaged, _first_shard(copy).name[:5], "missing")


def test_truncated_shard_is_named(copy: Path) -> None:
    shard = _first_shard(copy)
    shard.write_bytes(shard.read_bytes()[:-10])
    _refused(copy, CheckpointDamaged, shard.name, "cut short")


def test_missing_configuration_is_named(copy: Path) -> None:
    (copy / "config.json").unlink()
    _refused(copy, CheckpointDamaged, "config.json")


def test_unknown_family_is_refused(copy: Path) -> None:
    _edit_json(copy / "config.json", lambda config: config.update(model_type="other"))
    _refused(copy, FamilyUnknown, "'other'", "qwen3_moe")


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "a/../../x"])
def test_index_that_leads_out_of_the_folder_is_refused(copy: Path, path: str) -> None:
    _edit_json(copy / SHARD_INDEX, lambda table: table["weight_map"].update({"lm_head.weight": path}))  # type: ignore[attr-defined]
    _refused(copy, PathRefused, path)


def test_link_out_of_the_folder_is_refused(copy: Path) -> None:
    shard = _first_shard(copy)
    outside = copy.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    _refused(copy, PathRefused, shard.name, "leads out of")


def test_named_pipe_is_refused_without_waiting(copy: Path) -> None:
    shard = _first_shard(copy)
    shard.unlink()
    os.mkfifo(shard)
    _refused(copy, PathRefused, shard.name, "not a regular file")


def test_links_of_a_hub_cache_are_followed(copy: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "revision", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(copy.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert extract(snapshot, tmp_path / "store").num_experts == 16


def test_occupied_destination_is_refused_and_untouched(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("keep")
    with pytest.raises(DestinationOccupied, match="exists already"):
        extract(sharded, tmp_path / "store")
    assert (tmp_path / "store" / "mine.txt").read_text() == "keep"


def test_too_little_space_is_said_before_work_with_the_missing_amount(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_folder, "free_bytes", lambda folder: 1000)
    _refused(copy, DiskFull, "1000 free", "missing")


def test_disk_that_fills_up_in_the_middle_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    _refused(copy, DiskFull, "the disk is full")


def test_interrupt_leaves_nothing(copy: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(copy, tmp_path / "out" / "store", progress=interrupt)
    assert not list((tmp_path / "out").iterdir())
