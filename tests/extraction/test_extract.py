"""Checkpoint in, store out: bytes and hashes of the original, or a clear refusal with nothing left behind."""

from __future__ import annotations

import contextlib
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
    TensorUnexpected,
)
from extraction.expert_index import read_expert_index
from extraction.extract import extract, prepare
from extraction.manifest import ROLES, read_manifest
from extraction.plan import SHARD_INDEX


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
    assert not dest.parent.exists()


def test_missing_expert_is_named(copy: Path) -> None:
    _without_tensor(copy, "model.layers.1.mlp.experts.3.up_proj.weight")
    _refused(copy, TensorsMissing, "layer 1 expert 3 up", "1 tensor is missing")


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
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index_only", [False, True])
def test_destination_inside_the_source_is_a_store_like_any_other(copy: Path, index_only: bool) -> None:
    before = sorted(os.listdir(copy))
    extract(copy, copy / "stores/one", index_only=index_only)
    assert len(ExpertStore.open(copy / "stores/one").expert_keys()) == 16
    assert sorted(os.listdir(copy)) == sorted([*before, "stores"])
    assert os.listdir(copy / "stores") == ["one"]


def test_part_of_the_shards_is_refused_by_the_first_that_is_missing(copy: Path) -> None:
    shards = sorted(copy.glob("*.safetensors"))
    for shard in shards[3:]:
        shard.unlink()
    _refused(copy, CheckpointDamaged, shards[3].name, "is missing")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", SHARD_INDEX]
)
@pytest.mark.parametrize("kind", ["empty", "pipe", "folder", "link out", "deep"])
def test_description_that_is_none_is_refused_by_name(copy: Path, name: str, kind: str) -> None:
    path = copy / name
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "deep":
        path.write_text('{"a": ' + "[" * 300 + "]" * 300 + "}")
    else:
        path.symlink_to("/etc/hostname")
    _refused(copy, ExtractionError, name)


def test_empty_shard_is_refused_by_name(copy: Path) -> None:
    _first_shard(copy).write_bytes(b"")
    _refused(copy, CheckpointDamaged, _first_shard(copy).name, "0 bytes")


def test_expert_of_mixed_dtypes_is_refused(copy: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    shard = copy / json.loads((copy / SHARD_INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    save_file(tensors | {name: tensors[name].to(torch.bfloat16)}, shard)
    _refused(copy, TensorUnexpected, name, "differ in dtype")


def test_dtype_that_no_kernel_has_is_refused(copy: Path) -> None:
    shard = _first_shard(copy)
    tensors = load_file(shard)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(torch.float64)}, shard)
    _refused(copy, TensorUnexpected, name, "F64")


def test_backbone_of_another_dtype_than_the_experts_is_kept_as_it_is(sharded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({n: t.half() if ".experts." in n else t.bfloat16() for n, t in tensors.items()}, shard)
    source = _tensors(copy)
    extract(copy, tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store")
    assert {store.record(key).dtype for key in store.expert_keys()} == {"float16"}
    for entry in store.component("model").tensors:
        assert torch.equal(store.read_tensor("model", entry.name), source[entry.source])


def test_weird_names_are_quoted_on_one_line(copy: Path) -> None:
    weird = "a\n\x1b[2J\u202e" + "x" * 10_000
    shard = _first_shard(copy)
    _edit_json(copy / SHARD_INDEX, lambda table: table["weight_map"].update({weird: shard.name}))  # type: ignore[attr-defined]
    _refused(copy, TensorsMissing, r"a\n\x1b[2J\u202ex")
    save_file(load_file(shard) | {weird: torch.zeros(1)}, shard)
    _refused(copy, TensorUnexpected, r"a\n\x1b[2J\u202ex", "is not known in component model")


@pytest.mark.parametrize("path", ["a\nb.safetensors", "\x1b[2J.safetensors", "x" * 5000, "\ud800", "a\0b"])
def test_weird_shard_names_are_quoted_on_one_line(copy: Path, path: str) -> None:
    _edit_json(copy / SHARD_INDEX, lambda table: table["weight_map"].update({"lm_head.weight": path}))  # type: ignore[attr-defined]
    _refused(copy, ExtractionError, SHARD_INDEX)


def test_shards_in_a_folder_below_are_read(copy: Path, tmp_path: Path) -> None:
    (copy / "part").mkdir()
    shard = _first_shard(copy)
    shard.rename(copy / "part" / shard.name)
    table = json.loads((copy / SHARD_INDEX).read_text())
    for name, file in table["weight_map"].items():
        if file == shard.name:
            table["weight_map"][name] = f"part/{file}"
    (copy / SHARD_INDEX).write_text(json.dumps(table))
    assert extract(copy, tmp_path / "store").num_experts == 16


def test_read_error_names_the_shard_and_not_the_destination(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, first = os.preadv, _first_shard(copy)

    def fail_late(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.path.samestat(os.fstat(descriptor), first.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail_late)
    _refused(copy, CheckpointDamaged, first.name, "cannot be read at offset", "Input/output error")


def test_folder_that_may_not_be_read_is_not_called_incomplete(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    _refused(copy, PathRefused, str(copy), "Permission denied")


def _open_files() -> list[str]:
    """What this process has open now; other threads may close theirs meanwhile."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return paths


def test_one_of_many_shards_is_open_at_a_time(copy: Path, tmp_path: Path) -> None:
    most = 0

    def count(done: int, total: int) -> None:
        nonlocal most
        most = max(most, sum(path.startswith(str(copy)) for path in _open_files()))

    assert len(list(copy.glob("*.safetensors"))) > 4
    assert extract(copy, tmp_path / "store", progress=count).num_experts == 16
    assert most == 1


def test_disk_that_is_full_in_any_phase_leaves_nothing(
    copy: Path, mount_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first weights to the manifest, on a disk that really is full."""
    disk = mount_disk("size=16k")
    free_bytes = atomic_folder.free_bytes
    outcomes = []
    for size_kib in [*range(16, 900, 90), *range(640, 760, 10)]:
        mount_disk(f"remount,size={size_kib}k")
        answers = [1 << 40]
        monkeypatch.setattr(
            atomic_folder, "free_bytes", lambda path, a=answers: a.pop() if a else free_bytes(path)
        )
        try:
            extract(copy, disk / "store")
        except DiskFull as error:
            outcomes.append(False)
            assert error.needed > error.free
            assert os.listdir(disk) == []
        else:
            outcomes.append(True)
            assert len(ExpertStore.open(disk / "store").expert_keys()) == 16
            shutil.rmtree(disk / "store")
    assert {True, False} == set(outcomes)


def test_space_that_is_asked_for_is_enough_and_not_much_more(sharded: Path, tmp_path: Path) -> None:
    for kind in ("copied", "indexed"):
        root = tmp_path / kind
        extract(sharded, root, index_only=kind == "indexed")
        needed = prepare(sharded, index_only=kind == "indexed").space_needed
        taken = sum(path.stat().st_size for path in root.rglob("*"))
        assert taken <= needed < taken + (1 << 20)
