"""What the backbone computes, read from a component's configuration in the manifest. Plain data, checked once.

Sizes and most switches are those from which the store's tensors follow (`extraction.decoder_config`); here come the
ones that only the computation needs. Accepts the spellings of published checkpoints and of newer `transformers` alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extraction.decoder_config import (
    DecoderShape,
    DecoderTraits,
    QkNorm,
    read_decoder,
    read_flag,
    read_size,
    read_traits,
)
from extraction.errors import ConfigInvalid
from router.errors import ConfigUnsupported
from router.rope_config import RopeConfig, context_of, read_rope

SHARED_GATE_ROWS = 8
"""A matrix of one output takes a path of its own in every library; zero rows make it an ordinary one."""

MOST_TOKENS = (1 << 20) - 1
"""Of a vocabulary: among so many `router.sampling` draws."""


@dataclass(frozen=True)
class ModelConfig:
    """What the backbone needs to know. Names follow the published configuration keys where there is one."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    """Positions that are served, those that a RoPE scaling adds included."""
    qk_norm: QkNorm
    has_qkv_bias: bool
    has_output_bias: bool
    clip_qkv: float | None
    """Bound of the absolute values of queries, keys and values; None means none."""
    sliding_window: int | None
    """How many positions, its own included, a row sees in `windowed_layers`; elsewhere all before it."""
    windowed_layers: frozenset[int]
    num_experts: int
    experts_per_token: int
    normalise_top_k: bool
    moe_layers: frozenset[int]
    expert_width: int
    shared_width: int | None
    dense_width: int | None
    has_tied_head: bool

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def kv_elements_per_position(self) -> int:
        """Keys and values of all layers that one position adds to the cache."""
        return 2 * self.num_layers * self.kv_width

    @property
    def expert_elements(self) -> int:
        """Of the largest matrix that one expert's rows are multiplied with."""
        return 2 * self.expert_width * self.hidden_size

    def window(self, layer: int) -> int | None:
        """How many positions a row of this layer sees; None means all before it."""
        return self.sliding_window if layer in self.windowed_layers else None

    def gated_widths(self) -> list[int]:
        """Inner widths of all gated projections: experts, shared experts, dense layers."""
        routed = self.expert_width if self.moe_layers else None
        shared = self.shared_width if self.moe_layers else None
        return [width for width in (routed, shared, self.dense_width) if width is not None]

    def norm_widths(self) -> list[int]:
        """Of everything that a norm is taken over."""
        by_kind = {
            "none": [],
            "per_head": [self.head_dim],
            "whole_width": [self.q_width, self.kv_width],
        }
        return [self.hidden_size, *by_kind[self.qk_norm]]

    @property
    def _attention_matrices(self) -> list[tuple[int, int]]:
        """Queries, keys and values as one; the output."""
        width = self.hidden_size
        return [(self.q_width + 2 * self.kv_width, width), (width, self.q_width)]

    def backbone_matrices(self) -> list[tuple[int, int]]:
        """(out, in) of every matrix of all layers, without experts and gates, as they lie in memory: queries, keys and
        values are one, and so are gated projections and their gates."""
        shapes = self._attention_matrices * self.num_layers
        num_dense = self.num_layers - len(self.moe_layers)
        for inner, count in ((self.dense_width, num_dense), (self.shared_width, len(self.moe_layers))):
            if inner is not None:
                shapes += [(2 * inner, self.hidden_size), (self.hidden_size, inner)] * count
        return shapes

    def linear_shapes(self) -> list[tuple[int, int]]:
        """(out, in) of every matrix product of the model, for the self-test."""
        width = self.hidden_size
        shapes = [*self._attention_matrices, (self.vocab_size, width)]
        if self.moe_layers:
            shapes.append((self.num_experts, width))
            if self.shared_width is not None:
                shapes.append((SHARED_GATE_ROWS, width))
        for inner in self.gated_widths():
            shapes += [(2 * inner, width), (width, inner)]
        return shapes


def read_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Raises ConfigUnsupported when a key is missing, out of range, or asks for what is not computed here."""
    try:
        traits = read_traits(config)
        decoder = read_decoder(config)
        normalises = traits.normalises_top_k
        if normalises is None:
            normalises = read_flag(config, "norm_topk_prob", traits.default_norm_topk_prob)
        max_position = read_size(config, "max_position_embeddings", 32768)
        windowed = _windowed_layers(config, traits, decoder.num_layers)
        window = read_size(config, "sliding_window") if windowed else None
    except ConfigInvalid as error:
        raise ConfigUnsupported(error.key, error.reason) from error
    _check_computed(config, decoder)
    rope = read_rope(config, decoder.head_dim, max_position, traits.default_rope_theta)
    return ModelConfig(
        **vars(decoder),
        rms_norm_eps=_positive_number(config, "rms_norm_eps", traits.default_rms_norm_eps),
        rope=rope,
        max_position_embeddings=context_of(rope, max_position),
        clip_qkv=_positive_number(config, "clip_qkv") if config.get("clip_qkv") is not None else None,
        sliding_window=window,
        windowed_layers=windowed,
        normalise_top_k=normalises,
    )


def _check_computed(config: Mapping[str, Any], decoder: DecoderShape) -> None:
    if decoder.vocab_size > MOST_TOKENS:
        raise ConfigUnsupported("vocab_size", f"{decoder.vocab_size} is more than {MOST_TOKENS}")
    if decoder.num_heads % decoder.num_kv_heads:
        raise ConfigUnsupported(
            "num_key_value_heads", f"{decoder.num_kv_heads} does not divide {decoder.num_heads} heads"
        )
    if decoder.head_dim % 2:
        raise ConfigUnsupported("head_dim", f"{decoder.head_dim} is odd")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigUnsupported("hidden_act", f"{config['hidden_act']!r}; only 'silu' is computed")


def _windowed_layers(config: Mapping[str, Any], traits: DecoderTraits, num_layers: int) -> frozenset[int]:
    """Layers that see only a window. Raises ConfigInvalid."""
    everywhere = frozenset(range(num_layers))
    if traits.window == "never":
        return frozenset()
    if traits.window == "if_set":
        return everywhere if config.get("sliding_window") is not None else frozenset()
    if not read_flag(config, "use_sliding_window") or config.get("sliding_window") is None:
        return frozenset()
    if traits.window == "if_used":
        return everywhere
    kinds = config.get("layer_types")
    if kinds is None:
        bound = config.get("max_window_layers")
        bound = num_layers if bound is None else bound
        if type(bound) is not int or bound < 0:
            raise ConfigInvalid("max_window_layers", f"{bound!r} is not a whole number from 0")
        return frozenset(range(0, min(bound, num_layers), 2))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigInvalid("layer_types", f"is no list of {num_layers} kinds")
    unknown = {str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigInvalid("layer_types", f"{sorted(unknown)} are not computed")
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


def _positive_number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise ConfigUnsupported(key, f"{value!r} is not a positive number")
    return float(value)  # type: ignore[arg-type]
