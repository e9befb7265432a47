"""Reading a store: nothing altered, cut short or outside the folder is ever handed out."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.errors import ExpertCorrupt, ExpertError, StoreDamaged, UnknownExpert
from experts.hash_log import LOG_NAME
from experts.store import ExpertStore
from extraction.extract import extract
from extraction.manifest import MANIFEST_NAME, ExpertKey
from extraction.quantise import Quantization

KEY = ExpertKey("model", 2, 5)


@pytest.fixture
def copied(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


@pytest.fixture
def indexed(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """An index over a checkpoint that may be damaged."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    extract(checkpoint, tmp_path / "index", index_only=True)
    return tmp_path / "index"


def _flip(path: Path, offset: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


def test_expert_is_one_aligned_buffer(tiny_store: Path) -> None:
    store = ExpertStore.open(tiny_store)
    raw = store.read_expert(KEY)
    assert raw.dtype == torch.uint8
    assert raw.numel() == store.record(KEY).nbytes == 3 * 24 * 64 * 4
    assert raw.data_ptr() % 64 == 0


def test_unknown_expert_is_an_error(tiny_store: Path) -> None:
    store = ExpertStore.open(tiny_store)
    with pytest.raises(UnknownExpert):
        store.read_expert(ExpertKey("model", 1, 0))
    with pytest.raises(UnknownExpert):
        store.read_expert(ExpertKey("talker", 2, 0))


def test_altered_expert_is_refused_by_file_and_offset(copied: Path) -> None:
    part = ExpertStore.open(copied).record(KEY).parts[1]
    _flip(copied / part.file, part.offset + 17)
    store = ExpertStore.open(copied)
    with pytest.raises(
        ExpertCorrupt, match=r"model-layer-0002\.safetensors at offset \d+: the bytes were altered"
    ):
        store.read_expert(KEY)
    assert store.read_expert(ExpertKey("model", 2, 4)).numel()


def test_read_error_that_passes_is_retried(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ExpertStore.open(copied)
    expected = store.read_expert(KEY)
    fresh = ExpertStore.open(copied)
    read_into, calls = fresh._files.read_into, []

    def first_one_is_wrong(file: str, offset: int, raw: torch.Tensor) -> bool:
        is_whole = read_into(file, offset, raw)
        if not calls:
            raw[0] += 1
        calls.append(file)
        return is_whole

    monkeypatch.setattr(fresh._files, "read_into", first_one_is_wrong)
    assert torch.equal(fresh.read_expert(KEY), expected)
    assert len(calls) == 2


def test_truncated_expert_file_is_refused(copied: Path) -> None:
    path = copied / "experts/model-layer-0002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExpertCorrupt, match="cut short"):
        ExpertStore.open(copied).read_expert(ExpertKey("model", 2, 7))


def test_altered_backbone_tensor_is_refused_by_name(copied: Path) -> None:
    entry = ExpertStore.open(copied).component("model").tensors[0]
    _flip(copied / entry.file, entry.offset)
    with pytest.raises(StoreDamaged, match=entry.name):
        ExpertStore.open(copied).read_tensor("model", entry.name)


def test_matrix_that_is_not_quantised_as_the_manifest_says_is_refused_with_the_way_out(
    tiny_store: Path,
) -> None:
    int8 = Quantization(scheme="int8", group_size=None)
    with pytest.raises(
        StoreDamaged, match="as float32, the manifest says int8: extract the checkpoint again"
    ):
        ExpertStore.open(tiny_store).read_quantised("model", "lm_head.weight", int8)


def test_altered_tokenizer_is_refused(copied: Path) -> None:
    _flip(copied / "tokenizer.json", 100)
    with pytest.raises(StoreDamaged, match=r"tokenizer\.json"):
        ExpertStore.open(copied)


def test_store_that_lacks_a_file_says_which(copied: Path) -> None:
    (copied / "experts/model-layer-0002.safetensors").unlink()
    with pytest.raises(StoreDamaged, match="model-layer-0002"):
        ExpertStore.open(copied).read_expert(KEY)


def test_weight_file_that_links_out_is_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "experts/model-layer-0002.safetensors"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(StoreDamaged, match="leads out"):
        ExpertStore.open(copied).read_expert(KEY)


def test_random_bit_flips_and_truncations_never_give_other_bytes(copied: Path) -> None:
    """Any byte of any file: either the same weights come out, or an error."""
    reference = ExpertStore.open(copied)
    experts = {key: reference.read_expert(key) for key in reference.expert_keys()}
    tensors = {t.name: reference.read_tensor("model", t.name) for t in reference.component("model").tensors}
    draw = random.Random(5)
    files = [path for path in sorted(copied.rglob("*")) if path.is_file()]
    for trial in range(60):
        path = files[trial % len(files)]
        original = path.read_bytes()
        if draw.random() < 0.25:
            path.write_bytes(original[: draw.randrange(len(original))])
        else:
            _flip(path, draw.randrange(len(original)), draw.randrange(8))
        try:
            store = ExpertStore.open(copied)
            for key, expected in experts.items():
                assert torch.equal(store.read_expert(key), expected)
            for name, tensor in tensors.items():
                assert torch.equal(store.read_tensor("model", name), tensor)
        except ExpertError:
            pass
        path.write_bytes(original)


def test_index_over_shards_notices_a_change_after_the_first_load(indexed: Path) -> None:
    first = ExpertStore.open(indexed)
    first.read_expert(KEY)
    part = first.record(KEY).parts[0]
    assert first.record(KEY).sha256 is None
    assert (indexed / LOG_NAME).read_text().startswith("model 2 5 ")
    _flip(Path(str(first.manifest.source_root)) / part.file, part.offset)
    with pytest.raises(ExpertCorrupt, match="altered"):
        ExpertStore.open(indexed).read_expert(KEY)


def test_index_survives_a_damaged_hash_log(indexed: Path) -> None:
    (indexed / LOG_NAME).write_bytes(b"model 2 5 12\nnonsense\n\xff\xfe")
    assert ExpertStore.open(indexed).read_expert(KEY).numel()


def test_line_after_a_cut_one_is_kept(indexed: Path) -> None:
    """The next process must compare with what this one read, although another crashed while it wrote."""
    (indexed / LOG_NAME).write_bytes(b"model 2 5 12")
    ExpertStore.open(indexed).read_expert(KEY)
    part = ExpertStore.open(indexed).record(KEY).parts[0]
    _flip(indexed.parent / "checkpoint" / part.file, part.offset)
    with pytest.raises(ExpertCorrupt, match="altered"):
        ExpertStore.open(indexed).read_expert(KEY)


def test_backbone_over_shards_notices_a_change_after_the_first_load(indexed: Path) -> None:
    store = ExpertStore.open(indexed)
    entry = store.component("model").tensors[0]
    store.read_tensor("model", entry.name)
    _flip(indexed.parent / "checkpoint" / entry.file, entry.offset)
    with pytest.raises(StoreDamaged, match=f"{entry.name}.* was altered"):
        ExpertStore.open(indexed).read_tensor("model", entry.name)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_hash_log_that_is_no_file_is_refused(indexed: Path, kind: str) -> None:
    log = indexed / LOG_NAME
    if kind == "link":
        (indexed.parent / "outside").write_text("")
        log.symlink_to(indexed.parent / "outside")
    elif kind == "pipe":
        os.mkfifo(log)
    else:
        log.mkdir()
    with pytest.raises(StoreDamaged, match=LOG_NAME):
        ExpertStore.open(indexed).read_expert(KEY)


def test_hash_log_of_several_threads_has_one_line_an_expert(indexed: Path) -> None:
    store = ExpertStore.open(indexed)

    def read_all() -> None:
        for key in store.expert_keys():
            store.read_expert(key)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (indexed / LOG_NAME).read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(store.expert_keys())


def test_shard_replaced_before_the_first_load_is_refused(indexed: Path) -> None:
    """Same names and sizes in another order: every offset of the index now means another tensor."""
    shard = indexed.parent / "checkpoint/model.safetensors"
    tensors = load_file(shard)
    extra = {"a": torch.zeros(100)}
    save_file(extra | tensors, shard)
    store = ExpertStore.open(indexed)
    with pytest.raises(StoreDamaged, match="not what was indexed"):
        store.read_expert(KEY)
    with pytest.raises(StoreDamaged, match="not what was indexed"):
        store.read_tensor("model", "norm.weight")


def test_shard_of_another_dtype_is_refused(indexed: Path) -> None:
    shard = indexed.parent / "checkpoint/model.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(b'"F32"', b'"I32"'))
    with pytest.raises(StoreDamaged, match="has no float32 tensor"):
        ExpertStore.open(indexed).read_expert(KEY)


def test_truncated_shard_of_an_index_is_refused(indexed: Path) -> None:
    shard = indexed.parent / "checkpoint/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreDamaged, match="cut short"):
        ExpertStore.open(indexed).read_expert(KEY)


def test_size_beyond_the_file_is_refused_before_it_is_allocated(copied: Path) -> None:
    table = json.loads((copied / MANIFEST_NAME).read_text())
    table["components"][0]["tensors"][0].update(shape=[1 << 50], nbytes=4 << 50)
    (copied / MANIFEST_NAME).write_text(json.dumps(table))
    store = ExpertStore.open(copied)
    with pytest.raises(StoreDamaged, match="cut short"):
        store.read_tensor("model", table["components"][0]["tensors"][0]["name"])


def test_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreDamaged):
        ExpertStore.open(tmp_path / "loop")


def test_index_without_its_shards_says_so(indexed: Path) -> None:
    shutil.rmtree(indexed.parent / "checkpoint")
    with pytest.raises(StoreDamaged, match="missing"):
        ExpertStore.open(indexed).read_expert(KEY)


def test_manifest_whose_tensor_sizes_disagree_is_refused(copied: Path) -> None:
    table = json.loads((copied / MANIFEST_NAME).read_text())
    table["components"][0]["tensors"][0]["shape"] = [1 << 40]
    (copied / MANIFEST_NAME).write_text(json.dumps(table))
    with pytest.raises(StoreDamaged, match="do not hold"):
        ExpertStore.open(copied)


def test_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match=r"manifest\.json: is missing"):
        ExpertStore.open(tmp_path)


def test_several_threads_read_the_same_bytes(tiny_store: Path) -> None:
    store = ExpertStore.open(tiny_store)
    expected = {key: store.read_expert(key) for key in store.expert_keys()}
    fresh = ExpertStore.open(tiny_store)
    differing: list[ExpertKey] = []

    def read_all() -> None:
        for key, raw in expected.items():
            if not torch.equal(fresh.read_expert(key), raw):
                differing.append(key)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing
