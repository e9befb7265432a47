"""All families, as published and as newer `transformers` keep them in memory, in one shard and in many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.errors import StoreDamaged
from experts.store import ExpertStore
from extraction.errors import ConfigInvalid, TensorsMissing, TensorUnexpected
from extraction.extract import extract
from extraction.layouts import layout_for
from extraction.summary import summarize
from router.model_config import read_model_config
from tests.checkpoints import FAMILIES, write_tiny

SHARD_SIZE = "60KB"
OMNI = "qwen3_omni_moe"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint a family, as on the hub."""
    folder = tmp_path_factory.mktemp("published")
    return {family: write_tiny(family, folder / family) for family in FAMILIES}


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def _contents(root: Path) -> dict[Any, bytes]:
    """Bytes of every expert and backbone tensor."""
    store = ExpertStore.open(root)
    contents: dict[Any, bytes] = {
        key: store.read_expert(key).numpy().tobytes() for key in store.expert_keys()
    }
    for component in store.manifest.components:
        for entry in component.tensors:
            tensor = store.read_tensor(component.name, entry.name)
            contents[component.name, entry.name] = tensor.view(torch.uint8).numpy().tobytes()
    store.close()
    return contents


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_form_of_a_checkpoint_gives_the_same_bytes(
    family: str, published: dict[str, Path], tmp_path: Path
) -> None:
    extract(published[family], tmp_path / "store")
    expected = _contents(tmp_path / "store")
    num_bytes = sum(tensor.numel() * 4 for tensor in _tensors(published[family]).values())
    assert sum(map(len, expected.values())) == num_bytes
    for is_stacked, shard_size in ((False, SHARD_SIZE), (True, None), (True, SHARD_SIZE)):
        checkpoint = tmp_path / f"{is_stacked}-{shard_size}"
        write_tiny(family, checkpoint, is_stacked=is_stacked, shard_size=shard_size)
        assert len(list(checkpoint.glob("*.safetensors"))) > 1 or shard_size is None
        for index_only in (False, True):
            store = tmp_path / f"store-{is_stacked}-{shard_size}-{index_only}"
            extract(checkpoint, store, index_only=index_only)
            assert _contents(store) == expected, store.name


def test_every_tensor_of_an_omni_checkpoint_is_in_the_store(
    published: dict[str, Path], tmp_path: Path
) -> None:
    source = _tensors(published[OMNI])
    extract(published[OMNI], tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store")
    names = [component.name for component in store.manifest.components]
    assert names == ["thinker", "vision", "audio", "talker", "code_predictor", "code2wav"]
    for component in store.manifest.components:
        for entry in component.tensors:
            assert torch.equal(store.read_tensor(component.name, entry.name), source.pop(entry.source))
    for key in store.expert_keys():
        prefix = f"{key.component}.model.layers.{key.layer}.mlp.experts.{key.expert}."
        parts = [source.pop(f"{prefix}{role}_proj.weight") for role in ("gate", "up", "down")]
        expected = torch.cat([part.reshape(-1) for part in parts])
        assert torch.equal(store.read_expert(key).view(torch.float32), expected)
    assert not source
    store.close()


def test_served_component_and_totals_are_the_thinker_s(published: dict[str, Path], tmp_path: Path) -> None:
    extract(published[OMNI], tmp_path / "store")
    summary = summarize(tmp_path / "store")
    assert [row.name for row in summary.components if row.is_served] == ["thinker"]
    assert (summary.num_layers, summary.num_experts) == (2, 16)
    by_name = {row.name: row for row in summary.components}
    assert (by_name["talker"].num_experts, by_name["vision"].num_experts) == (12, 0)
    assert by_name["thinker"].expert_bytes == 16 * 3 * 24 * 64 * 4
    assert by_name["talker"].expert_bytes == 12 * 3 * 20 * 48 * 4
    total = sum(row.expert_bytes + row.backbone_bytes for row in summary.components)
    assert total == sum(tensor.numel() * 4 for tensor in _tensors(published[OMNI]).values())


def _resaved(published: Path, copy: Path, change: dict[str, torch.Tensor | None], **config: Any) -> Path:
    """The checkpoint with tensors changed (None removes) and keys of its configuration."""
    tensors: dict[str, Any] = _tensors(published) | change
    copy.mkdir()
    save_file({n: t for n, t in tensors.items() if t is not None}, copy / "model.safetensors")
    table = json.loads((published / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(table | config))
    return copy


def test_omni_checkpoint_without_a_part_is_refused_by_its_name(
    published: dict[str, Path], tmp_path: Path
) -> None:
    gone = dict.fromkeys(n for n in _tensors(published[OMNI]) if n.startswith("thinker.visual."))
    with pytest.raises(TensorsMissing, match=r"thinker\.visual\.\*"):
        extract(_resaved(published[OMNI], tmp_path / "a", gone), tmp_path / "store")
    lost = {"talker.model.layers.1.mlp.experts.5.up_proj.weight": None}
    with pytest.raises(TensorsMissing, match="talker layer 1 expert 5 up"):
        extract(_resaved(published[OMNI], tmp_path / "b", lost), tmp_path / "store")


def test_omni_checkpoint_that_does_not_speak_has_no_talker(
    published: dict[str, Path], tmp_path: Path
) -> None:
    silent = dict.fromkeys(n for n in _tensors(published[OMNI]) if n.startswith(("talker.", "code2wav.")))
    checkpoint = _resaved(published[OMNI], tmp_path / "a", silent, enable_audio_output=False)
    extract(checkpoint, tmp_path / "store")
    assert [row.name for row in summarize(tmp_path / "store").components] == ["thinker", "vision", "audio"]
    config = json.loads((checkpoint / "config.json").read_text())
    with pytest.raises(ConfigInvalid, match="talker_config"):
        layout_for(config | {"enable_audio_output": True, "talker_config": None})


def test_expert_that_is_there_twice_is_refused(published: dict[str, Path], tmp_path: Path) -> None:
    stack = {"model.layers.0.mlp.experts.down_proj": torch.zeros(8, 64, 24)}
    with pytest.raises(TensorUnexpected, match="means the same as"):
        extract(_resaved(published["mixtral"], tmp_path / "a", stack), tmp_path / "store")


def test_projection_by_another_family_s_name_is_refused(published: dict[str, Path], tmp_path: Path) -> None:
    named = {"model.layers.0.block_sparse_moe.experts.0.gate_proj.weight": torch.zeros(24, 64)}
    with pytest.raises(TensorUnexpected, match="is not known"):
        extract(_resaved(published["mixtral"], tmp_path / "a", named), tmp_path / "store")


def test_stack_that_was_exchanged_since_it_was_indexed_is_refused(tmp_path: Path) -> None:
    """Same bytes in the file, of another shape: an expert's place is no longer one matrix of a stack."""
    checkpoint = write_tiny("olmoe", tmp_path / "checkpoint", is_stacked=True)
    extract(checkpoint, tmp_path / "store", index_only=True)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {n: t.reshape(-1, 64) if n.endswith("down_proj") else t for n, t in tensors.items()}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    store = ExpertStore.open(tmp_path / "store")
    with pytest.raises(StoreDamaged, match="is not what was indexed"):
        store.read_expert(store.expert_keys()[0])


def _as_published_before(config: dict[str, Any]) -> dict[str, Any]:
    """The spelling of checkpoints that older programs wrote."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope if len(rope) > 1 else None
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


@pytest.mark.parametrize("family", list(FAMILIES))
def test_old_and_new_spellings_of_a_configuration_mean_the_same(
    family: str, published: dict[str, Path]
) -> None:
    config = json.loads((published[family] / "config.json").read_text())
    for component in layout_for(config).components:
        if component.decoder is not None:
            old = _as_published_before(dict(component.config))
            assert old.keys() != component.config.keys()
            assert read_model_config(old) == read_model_config(component.config)
