"""A decoder's shape, read from its part of a published configuration. Plain data, checked once.

Owns what differs between families and what they spell differently: everything above this module, the names of tensors
(`extraction.layouts`) and the computation (`router.model_config`), works from the same `DecoderShape`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from extraction.errors import ConfigInvalid

MAX_EXPERTS = 1 << 18
"""Of all layers; ten times the largest published model. Bounds what a hostile configuration can make us allocate."""
MAX_LAYERS = 4096
MAX_SIZE = 1 << 24

QkNorm = Literal["none", "per_head", "whole_width"]


@dataclass(frozen=True)
class DecoderTraits:
    """What a family's program fixes, so that its configurations need not say it.

    Source: the modeling and configuration modules of `transformers`.
    """

    qk_norm: QkNorm = "none"
    qkv_bias: tuple[str, bool] | None = ("attention_bias", False)
    """The key that says whether q, k and v have biases, and its default; None means never."""
    has_output_bias: bool = True
    """Whether the output projection has a bias where q, k and v have one."""
    expert_width_key: str = "moe_intermediate_size"
    has_shared_expert: bool = False
    can_have_dense_layers: bool = False
    """By `mlp_only_layers` and `decoder_sparse_step`."""
    normalises_top_k: bool | None = None
    """None means as `norm_topk_prob` says."""
    window: Literal["never", "if_set", "if_used", "by_layer"] = "never"
    """Which layers have a sliding window: none; all where `sliding_window` is set; all where `use_sliding_window` says
    so; or then those of `layer_types`, else every other one below `max_window_layers`."""
    default_norm_topk_prob: bool = False
    default_rms_norm_eps: float = 1e-6
    default_rope_theta: float = 10000.0


TRAITS: Mapping[str, DecoderTraits] = {
    "qwen3_moe": DecoderTraits(qk_norm="per_head", can_have_dense_layers=True, window="if_used"),
    "qwen3_omni_moe_text": DecoderTraits(
        qk_norm="per_head", can_have_dense_layers=True, default_norm_topk_prob=True
    ),
    "qwen3_omni_moe_talker_text": DecoderTraits(qk_norm="per_head", has_shared_expert=True),
    "qwen2_moe": DecoderTraits(
        qkv_bias=("qkv_bias", True),
        has_output_bias=False,
        has_shared_expert=True,
        can_have_dense_layers=True,
        window="by_layer",
    ),
    "olmoe": DecoderTraits(
        qk_norm="whole_width", expert_width_key="intermediate_size", default_rms_norm_eps=1e-5
    ),
    "mixtral": DecoderTraits(
        qkv_bias=None,
        expert_width_key="intermediate_size",
        normalises_top_k=True,
        window="if_set",
        default_rms_norm_eps=1e-5,
        default_rope_theta=1e6,
    ),
}
"""By the `model_type` of the decoder's own configuration."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and switches from which names and shapes of all tensors follow."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: QkNorm
    has_qkv_bias: bool
    has_output_bias: bool
    num_experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int | None
    """Of the expert that every token passes; None where there is none."""
    dense_width: int | None
    """Of the layers without experts; None where there are none."""
    moe_layers: frozenset[int]
    has_tied_head: bool

    def expert_shape(self, role: str) -> tuple[int, int]:
        """[out, in] of an expert's gate, up or down projection."""
        if role == "down":
            return self.hidden_size, self.expert_width
        return self.expert_width, self.hidden_size


def read_traits(config: Mapping[str, Any]) -> DecoderTraits:
    """Raises ConfigInvalid for a decoder that is not known."""
    traits = TRAITS.get(str(config.get("model_type")))
    if traits is None:
        raise ConfigInvalid(
            "model_type", f"{config.get('model_type')!r} is no known decoder; known: {', '.join(TRAITS)}"
        )
    return traits


def read_decoder(config: Mapping[str, Any]) -> DecoderShape:
    """Accepts the spellings of published checkpoints and of newer `transformers`. Raises ConfigInvalid."""
    traits = read_traits(config)
    layers, width = read_size(config, "num_hidden_layers"), read_size(config, "hidden_size")
    heads = read_size(config, "num_attention_heads")
    experts = read_size(config, "num_local_experts" if "num_local_experts" in config else "num_experts")
    if layers * experts > MAX_EXPERTS:
        raise ConfigInvalid("num_experts", f"{layers} layers of {experts} are more than {MAX_EXPERTS}")
    if layers > MAX_LAYERS:
        raise ConfigInvalid("num_hidden_layers", f"{layers} layers are more than {MAX_LAYERS}")
    per_token = read_size(config, "num_experts_per_tok")
    if per_token > experts:
        raise ConfigInvalid("num_experts_per_tok", f"{per_token} of {experts} experts")
    moe_layers = _moe_layers(config, layers) if traits.can_have_dense_layers else frozenset(range(layers))
    has_bias = traits.qkv_bias is not None and read_flag(config, *traits.qkv_bias)
    return DecoderShape(
        vocab_size=read_size(config, "vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=read_size(config, "num_key_value_heads", heads),
        head_dim=read_size(config, "head_dim", max(1, width // heads)),
        qk_norm=traits.qk_norm,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias and traits.has_output_bias,
        num_experts=experts,
        experts_per_token=per_token,
        expert_width=read_size(config, traits.expert_width_key),
        shared_width=read_size(config, "shared_expert_intermediate_size")
        if traits.has_shared_expert
        else None,
        dense_width=read_size(config, "intermediate_size") if len(moe_layers) < layers else None,
        moe_layers=moe_layers,
        has_tied_head=read_flag(config, "tie_word_embeddings"),
    )


def read_size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number from 1 to MAX_SIZE; null means absent. Raises ConfigInvalid."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
        raise ConfigInvalid(key, f"{value!r} is not a whole number from 1 to {MAX_SIZE}")
    return value


def read_flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Null means absent. Raises ConfigInvalid."""
    value = config.get(key)
    if value not in (None, False, True):
        raise ConfigInvalid(key, f"{value!r} is neither true nor false")
    return default if value is None else bool(value)


def _moe_layers(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    step = read_size(config, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigInvalid("mlp_only_layers", f"{dense!r} is no list of whole numbers")
    return frozenset(layer for layer in set(range(layers)) - set(dense) if (layer + 1) % step == 0)
