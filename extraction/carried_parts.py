"""Which tensors Qwen3-Omni's parts without experts must have, by their configurations. Pure.

Only names: shapes are checked by who computes with them (`router.media`). Called by `extraction.omni_layout`.
Source: the modeling module of `transformers`, and its defaults for keys that a configuration leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from extraction.decoder_config import MAX_LAYERS, read_flag, read_size
from extraction.errors import ConfigInvalid

Config = Mapping[str, Any]
Names = frozenset[str]
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def vision_names(config: Config) -> Names:
    """Blocks, and a merger for each block whose output is handed to a layer of the decoder."""
    deepstack = len(_list(config, "deepstack_visual_indexes", 3))
    blocks = [f"blocks.{number}" for number in range(_count(config, "depth", 27))]
    inner = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    mergers = ["merger", *(f"merger_list.{number}" for number in range(deepstack))]
    return frozenset(
        {
            "pos_embed.weight",
            *_with_bias("patch_embed.proj"),
            *_with_bias(*_each(blocks, inner)),
            *_with_bias(*_each(mergers, ("ln_q", "mlp.0", "mlp.2"))),
        }
    )


def audio_names(config: Config) -> Names:
    layers = [f"layers.{number}" for number in range(_count(config, "encoder_layers", 32))]
    attention = (f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    inner = (*attention, "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
    around = ("conv2d1", "conv2d2", "conv2d3", "ln_post", "proj1", "proj2")
    return frozenset({"conv_out.weight", *_with_bias(*around, *_each(layers, inner))})


def code_predictor_names(config: Config) -> Names:
    """A dense decoder with an embedding and a head for each group of codes but the first."""
    layers = [f"layers.{number}" for number in range(_count(config, "num_hidden_layers", 5))]
    groups = range(_count(config, "num_code_groups", 32) - 1)
    norms = ("self_attn.q_norm", "self_attn.k_norm")
    per_group = _each(
        (f"{name}.{group}" for group in groups for name in ("codec_embedding", "lm_head")), ("weight",)
    )
    return frozenset({"norm.weight", *per_group, *_dense_layers(config, layers, norms)})


def code2wav_names(config: Config) -> Names:
    """A small decoder, a stack that upsamples codes, and one that upsamples sound."""
    layers = [f"pre_transformer.layers.{number}" for number in range(_count(config, "num_hidden_layers", 8))]
    upsamples = [f"upsample.{number}" for number in range(len(_list(config, "upsampling_ratios", 2)))]
    num_blocks = len(_list(config, "upsample_rates", 4))
    blocks = [f"decoder.{number}.block" for number in range(1, num_blocks + 1)]
    units = _each(blocks, ("2", "3", "4"))
    activations = [*_each(blocks, ("0",)), *_each(units, ("act1", "act2")), f"decoder.{num_blocks + 1}"]
    convolutions = ("decoder.0", *_each(blocks, ("1",)), *_each(units, ("conv1", "conv2")))
    last = f"decoder.{num_blocks + 2}"
    scales = ("self_attn_layer_scale", "mlp_layer_scale")
    return frozenset(
        {
            "code_embedding.weight",
            "pre_transformer.norm.weight",
            *_dense_layers(config, layers, ()),
            *_each(layers, (f"{name}.scale" for name in scales)),
            *_each(upsamples, ("1.gamma",)),
            *_with_bias(*_each(upsamples, ("0.conv", "1.dwconv.conv", "1.norm", "1.pwconv1", "1.pwconv2"))),
            *_each(activations, ("alpha", "beta")),
            *_with_bias(*_each((*convolutions, last), ("conv",))),
        }
    )


def _dense_layers(config: Config, layers: list[str], norms: tuple[str, ...]) -> list[str]:
    attention = [f"self_attn.{name}" for name in _ATTENTION]
    inner = ("input_layernorm", "post_attention_layernorm", *attention, *_GATED, *norms)
    biases = _each(_each(layers, attention), ("bias",)) if read_flag(config, "attention_bias") else []
    return [*_each(_each(layers, inner), ("weight",)), *biases]


def _each(prefixes: Iterable[str], names: Iterable[str]) -> list[str]:
    suffixes = tuple(names)
    return [f"{prefix}.{name}" for prefix in prefixes for name in suffixes]


def _with_bias(*modules: str) -> list[str]:
    return _each(modules, ("weight", "bias"))


def _count(config: Config, key: str, default: int) -> int:
    value = read_size(config, key, default)
    if value > MAX_LAYERS:
        raise ConfigInvalid(key, f"{value} is more than {MAX_LAYERS}")
    return value


def _list(config: Config, key: str, default_length: int) -> list[Any]:
    value = config.get(key)
    if value is None:
        return [None] * default_length
    if not isinstance(value, list) or len(value) > MAX_LAYERS:
        raise ConfigInvalid(key, f"is no list of at most {MAX_LAYERS} entries")
    return value
