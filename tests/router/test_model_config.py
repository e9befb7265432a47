"""Spellings of configurations, and refusals that name the key."""

from __future__ import annotations

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
    ],
)
def test_what_is_not_computed_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigUnsupported) as refused:
        tiny_config(**{key: value})
    assert refused.value.key == key


def test_unknown_rope_type_is_refused() -> None:
    with pytest.raises(
        ConfigUnsupported, match="'longrope'; computed are default, linear, dynamic, yarn, llama3"
    ):
        tiny_config(rope_parameters={"rope_type": "longrope", "factor": 4.0})
