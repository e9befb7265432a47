"""The family table: names, shapes, and which layers have experts."""

from __future__ import annotations

from typing import Any

import pytest

from extraction.component_layout import BackboneTensor, ComponentLayout, ExpertTensor, Placement, TensorSlice
from extraction.errors import ConfigInvalid, FamilyUnknown, TensorUnexpected
from extraction.layouts import layout_for
from extraction.manifest import ExpertKey
from tests.router.configs import TINY

EXPERT = "model.layers.1.mlp.experts.7.down_proj.weight"


def _config(**overrides: Any) -> dict[str, Any]:
    return TINY | overrides


def _model(**overrides: Any) -> ComponentLayout:
    (component,) = layout_for(_config(**overrides)).components
    return component


def test_expert_projection_is_placed_by_layer_expert_and_role() -> None:
    expected = (Placement(ExpertTensor(ExpertKey("model", 1, 7), "down")),)
    assert layout_for(_config()).place(EXPERT, (64, 24)) == expected


def test_stacked_projections_are_placed_slice_by_slice() -> None:
    layout = layout_for(_config())
    placed = {
        p.place: p.slice
        for name, shape in (("gate_up_proj", (8, 48, 64)), ("down_proj", (8, 64, 24)))
        for p in layout.place(f"model.layers.1.mlp.experts.{name}", shape)
    }
    assert len(placed) == 8 * 3
    size = 24 * 64
    key = ExpertKey("model", 1, 5)
    assert placed[ExpertTensor(key, "gate")] == TensorSlice(10 * size, (24, 64))
    assert placed[ExpertTensor(key, "up")] == TensorSlice(11 * size, (24, 64))
    assert placed[ExpertTensor(key, "down")] == TensorSlice(5 * size, (64, 24))


def test_backbone_tensor_loses_the_leading_model() -> None:
    layout = layout_for(_config())
    assert layout.place("model.norm.weight", (64,)) == (Placement(BackboneTensor("model", "norm.weight")),)
    assert layout.place("lm_head.weight", (512, 64)) == (
        Placement(BackboneTensor("model", "lm_head.weight")),
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (EXPERT, (24, 64)),
        ("model.layers.1.mlp.experts.8.down_proj.weight", (64, 24)),
        ("model.layers.2.mlp.experts.0.down_proj.weight", (64, 24)),
        ("model.layers.0.mlp.gate.bias", (8,)),
        ("model.norm.weight", (65,)),
        ("something.else", (1,)),
        ("model.layers.01.mlp.experts.7.down_proj.weight", (64, 24)),
        ("model.layers.1.mlp.experts.٧.down_proj.weight", (64, 24)),
        ("model.layers.1.mlp.experts.7.w2.weight", (64, 24)),
        ("model.layers.1.mlp.experts.gate_up_proj", (8, 64, 48)),
        ("model.layers.2.mlp.experts.down_proj", (8, 64, 24)),
    ],
)
def test_tensor_that_the_configuration_does_not_imply_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorUnexpected):
        layout_for(_config()).place(name, shape)


def test_dense_layers_have_no_experts() -> None:
    layout = _model(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])
    assert {key.layer for key in layout.experts} == {1}
    assert "layers.0.mlp.gate_proj.weight" in layout.backbone_shapes
    assert "layers.1.mlp.gate.weight" in layout.backbone_shapes


def test_tied_head_is_not_expected_and_a_written_copy_is_ignored() -> None:
    layout = layout_for(_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in _model(tie_word_embeddings=True).backbone_shapes
    assert layout.is_ignored("lm_head.weight")
    assert not layout_for(_config()).is_ignored("lm_head.weight")


def test_old_and_new_spelling_of_the_expert_count_mean_the_same() -> None:
    new = {key: value for key, value in _config().items() if key != "num_experts"} | {"num_local_experts": 8}
    assert layout_for(new).experts == layout_for(_config()).experts


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(
        FamilyUnknown,
        match=r"'gpt2' is not supported; known: mixtral, olmoe, qwen2_moe, qwen3_moe, qwen3_omni_moe",
    ):
        layout_for({"model_type": "gpt2"})


@pytest.mark.parametrize(
    "damage",
    [
        {"hidden_size": None},
        {"hidden_size": -1},
        {"hidden_size": "64"},
        {"num_experts": True},
        {"num_hidden_layers": 10**6, "num_experts": 10**6},
        {"decoder_sparse_step": 0},
        {"decoder_sparse_step": "2"},
        {"num_hidden_layers": 1 << 17, "num_experts": 2},
        {"num_experts_per_tok": None},
        {"num_experts_per_tok": 9},
        {"mlp_only_layers": 5},
        {"mlp_only_layers": "ab"},
        {"mlp_only_layers": [[1]]},
        {"tie_word_embeddings": "false"},
        {"intermediate_size": 0, "mlp_only_layers": [0]},
    ],
)
def test_damaged_configuration_is_refused_before_anything_is_built(damage: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid):
        layout_for(_config(**damage))
