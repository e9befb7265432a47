"""Spellings of configurations, and refusals that name the key."""

from __future__ import annotations

from typing import Any

import pytest

from router.errors import ConfigUnsupported
from tests.router.configs import tiny_config


def test_old_and_new_spellings_mean_the_same() -> None:
    old = tiny_config(rope_theta=5e6, rope_scaling=None)
    new = tiny_config(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    assert old == new
    assert tiny_config(num_local_experts=8) == tiny_config()


def test_dense_layers_are_found_by_list_and_by_step() -> None:
    assert tiny_config(num_hidden_layers=4, mlp_only_layers=[0, 2]).moe_layers == {1, 3}
    assert tiny_config(num_hidden_layers=4, decoder_sparse_step=2).moe_layers == {1, 3}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("hidden_act", "gelu"),
        ("attention_bias", "yes"),
        ("model_type", "gpt2"),
        ("rms_norm_eps", 0),
        ("mlp_only_layers", "ab"),
        ("num_experts_per_tok", 9),
        ("decoder_sparse_step", 0),
        ("num_hidden_layers", 1 << 30),
        ("vocab_size", 1 << 20),
    ],
)
def test_what_is_not_computed_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigUnsupported) as refused:
        tiny_config(**{key: value})
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("qwen3_moe", {"sliding_window": 9}, set()),
        ("qwen3_moe", {"sliding_window": 9, "use_sliding_window": True}, {0, 1, 2, 3}),
        ("qwen3_moe", {"sliding_window": None, "use_sliding_window": True}, set()),
        ("mixtral", {"sliding_window": 9}, {0, 1, 2, 3}),
        ("mixtral", {"sliding_window": None}, set()),
        ("olmoe", {"sliding_window": 9, "use_sliding_window": True}, set()),
        ("qwen2_moe", {"sliding_window": 0, "use_sliding_window": False}, set()),
        ("qwen2_moe", {"sliding_window": 9, "use_sliding_window": True}, {0, 2}),
        ("qwen2_moe", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, {0}),
        (
            "qwen2_moe",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
            {3},
        ),
    ],
)
def test_windows_are_those_of_the_family(family: str, changes: dict[str, Any], layers: set[int]) -> None:
    config = tiny_config(model_type=family, num_hidden_layers=4, shared_expert_intermediate_size=8, **changes)
    assert config.windowed_layers == layers
    assert [config.window(layer) for layer in range(4)] == [9 if n in layers else None for n in range(4)]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sliding_window": -1}, "sliding_window"),
        ({"sliding_window": 9, "layer_types": ["full_attention"]}, "layer_types"),
        ({"sliding_window": 9, "layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"sliding_window": 9, "max_window_layers": "two"}, "max_window_layers"),
        ({"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
        ({"qkv_bias": 3}, "qkv_bias"),
        ({"clip_qkv": -1}, "clip_qkv"),
        ({"clip_qkv": float("inf")}, "clip_qkv"),
    ],
)
def test_damaged_switch_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    sound = {"model_type": "qwen2_moe", "use_sliding_window": True, "shared_expert_intermediate_size": 8}
    with pytest.raises(ConfigUnsupported) as refused:
        tiny_config(**sound | changes)
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor"),
        ({"rope_type": "dynamic", "factor": float("nan")}, "factor"),
        (
            {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": -1},
            "original_max_position_embeddings",
        ),
        ({"rope_type": "llama3", "factor": 2}, "low_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1},
            "high_freq_factor",
        ),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mrope_section": [1, 2]}, "mrope_section"),
        ({"mrope_section": [9, -2, 1]}, "mrope_section"),
        ({"rope_type": "dynamic", "factor": 2, "mrope_section": [4, 2, 2]}, "rope_type"),
        ("yarn", "rope_parameters"),
    ],
)
def test_damaged_rope_is_refused_by_name(rope: Any, key: str) -> None:
    with pytest.raises(ConfigUnsupported) as refused:
        tiny_config(rope_parameters=rope)
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4}, 1024),
        ({"rope_type": "dynamic", "factor": 2.5}, 640),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}, 256),
        ({"rope_type": "linear", "factor": 60000}, 15_360_000),
    ],
)
def test_context_is_stretched_by_what_stretches_it(rope: dict[str, Any], context: int) -> None:
    assert tiny_config(rope_parameters=rope).max_position_embeddings == context


def test_unknown_rope_type_is_refused() -> None:
    with pytest.raises(
        ConfigUnsupported, match="'longrope'; computed are default, linear, dynamic, yarn, llama3"
    ):
        tiny_config(rope_parameters={"rope_type": "longrope", "factor": 4.0})
