"""Qwen3-Omni's parts without experts: which tensors their configurations imply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from extraction.carried_parts import audio_names, code2wav_names, code_predictor_names, vision_names
from extraction.errors import ConfigInvalid, TensorsMissing
from extraction.plan import plan_extraction
from tests.checkpoints import write_tiny

PARTS = {
    "vision": vision_names,
    "audio": audio_names,
    "code_predictor": code_predictor_names,
    "code2wav": code2wav_names,
}


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen3_omni_moe", tmp_path_factory.mktemp("omni") / "checkpoint")


def test_names_are_those_that_the_published_program_writes(omni: Path) -> None:
    components = {part.name: part for part in plan_extraction(omni).components}
    for name, names in PARTS.items():
        assert names(components[name].config) == components[name].backbone.keys(), name


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [
        ("vision", {"depth": 27, "deepstack_visual_indexes": [8, 16, 24]}, 351),
        ("audio", {"encoder_layers": 32}, 525),
        ("code_predictor", {"num_hidden_layers": 5, "num_code_groups": 16}, 86),
        (
            "code2wav",
            {"num_hidden_layers": 8, "upsample_rates": [8, 5, 4, 3], "upsampling_ratios": [2, 2]},
            230,
        ),
    ],
)
def test_published_model_has_as_many_tensors_as_its_configuration_implies(
    name: str, config: dict[str, Any], count: int
) -> None:
    assert len(PARTS[name](config)) == count
    if name != "code_predictor":  # whose default is another number of code groups
        assert PARTS[name]({}) == PARTS[name](config)


@pytest.mark.parametrize(
    ("tensor", "reported"),
    [
        ("thinker.visual.blocks.2.attn.qkv.bias", "vision blocks.2.attn.qkv.bias"),
        ("thinker.visual.merger_list.1.ln_q.weight", "vision merger_list.1.ln_q.weight"),
        ("thinker.audio_tower.layers.0.fc1.weight", "audio layers.0.fc1.weight"),
        ("talker.code_predictor.lm_head.2.weight", "code_predictor lm_head.2.weight"),
        ("talker.code_predictor.model.norm.weight", "code_predictor norm.weight"),
        ("code2wav.decoder.2.block.3.act1.beta", "code2wav decoder.2.block.3.act1.beta"),
    ],
)
def test_missing_tensor_of_a_carried_part_is_named(
    omni: Path, tmp_path: Path, tensor: str, reported: str
) -> None:
    tensors = load_file(omni / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((omni / "config.json").read_bytes())
    with pytest.raises(TensorsMissing) as caught:
        plan_extraction(tmp_path)
    assert (caught.value.names, caught.value.total) == ((reported,), 1)


def test_part_with_fewer_blocks_than_configured_is_refused(omni: Path, tmp_path: Path) -> None:
    config = json.loads((omni / "config.json").read_text())
    config["thinker_config"]["audio_config"]["encoder_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((omni / "model.safetensors").read_bytes())
    with pytest.raises(TensorsMissing, match=r"16 tensors are missing: audio layers\.1\."):
        plan_extraction(tmp_path)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vision", {"depth": 10**6}),
        ("vision", {"deepstack_visual_indexes": 3}),
        ("audio", {"encoder_layers": "32"}),
        ("code_predictor", {"attention_bias": "yes"}),
        ("code2wav", {"upsample_rates": [2] * 5000}),
    ],
)
def test_configuration_of_no_model_is_refused(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid, match=next(iter(config))):
        PARTS[name](config)


@pytest.mark.parametrize("name", ["code_predictor", "code2wav"])
def test_attention_biases_are_expected_where_they_are_switched_on(name: str) -> None:
    biases = PARTS[name]({"attention_bias": True}) - PARTS[name]({})
    assert biases and all(tensor.endswith("_proj.bias") for tensor in biases)
