"""The decoder's shape, read from a component's configuration in the manifest. Plain data, checked once.

Accepts the spellings of published checkpoints and of newer `transformers` versions alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.errors import ConfigUnsupported


@dataclass(frozen=True)
class ModelConfig:
    """What the backbone needs to know. Names follow the published configuration keys."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...] | None
    max_position_embeddings: int
    num_experts: int
    experts_per_token: int
    normalise_top_k: bool
    moe_layers: frozenset[int]
    expert_width: int
    dense_width: int
    has_tied_head: bool

    @property
    def kv_elements_per_position(self) -> int:
        """Keys and values of all layers that one position adds to the cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def expert_elements(self) -> int:
        """Of the largest matrix that one expert's rows are multiplied with."""
        return 2 * self.expert_width * self.hidden_size

    def linear_shapes(self) -> list[tuple[int, int]]:
        """(out, in) of every matrix product of the model, for the self-test."""
        width, kv_width = self.hidden_size, self.num_kv_heads * self.head_dim
        q_width = self.num_heads * self.head_dim
        shapes = [
            (q_width + 2 * kv_width, width),
            (width, q_width),
            (self.vocab_size, width),
        ]
        if self.moe_layers:
            shapes += [
                (self.num_experts, width),
                (2 * self.expert_width, width),
                (width, self.expert_width),
            ]
        if len(self.moe_layers) < self.num_layers:
            shapes += [(2 * self.dense_width, width), (width, self.dense_width)]
        return shapes


def read_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Raises ConfigUnsupported when a key is missing, out of range, or asks for what is not computed here."""
    rope = _rope(config)
    num_layers = _positive(config, "num_hidden_layers")
    hidden_size = _positive(config, "hidden_size")
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigUnsupported("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads")
    head_dim = _positive(config, "head_dim", max(1, hidden_size // num_heads))
    if head_dim % 2:
        raise ConfigUnsupported("head_dim", f"{head_dim} is odd")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigUnsupported("hidden_act", f"{config['hidden_act']!r}; only 'silu' is computed")
    if config.get("attention_bias"):
        raise ConfigUnsupported("attention_bias", "biases in attention are not computed")
    if config.get("use_sliding_window") and config.get("sliding_window"):
        raise ConfigUnsupported("sliding_window", "windowed attention is not computed")
    experts_key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    num_experts = _positive(config, experts_key)
    top_k = _positive(config, "num_experts_per_tok")
    if top_k > num_experts:
        raise ConfigUnsupported("num_experts_per_tok", f"{top_k} of {num_experts} experts")
    return ModelConfig(
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        mrope_section=_mrope_section(rope, head_dim),
        max_position_embeddings=_positive(config, "max_position_embeddings", 32768),
        num_experts=num_experts,
        experts_per_token=top_k,
        normalise_top_k=bool(config.get("norm_topk_prob", False)),
        moe_layers=_moe_layers(config, num_layers),
        expert_width=_positive(config, "moe_intermediate_size"),
        dense_width=_positive(config, "intermediate_size", 1),
        has_tied_head=bool(config.get("tie_word_embeddings", False)),
    )


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 24:
        raise ConfigUnsupported(key, f"{value!r} is not a whole number from 1 to {1 << 24}")
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters from `rope_parameters`, or from `rope_theta` with `rope_scaling`."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigUnsupported("rope_type", f"{kind!r}; only 'default' is computed")
    return rope


def _mrope_section(rope: Mapping[str, Any], head_dim: int) -> tuple[int, ...] | None:
    section = rope.get("mrope_section")
    if section is None:
        return None
    if len(section) != 3 or sum(section) != head_dim // 2:
        raise ConfigUnsupported("mrope_section", f"{section} does not share out {head_dim // 2} frequencies")
    if not rope.get("mrope_interleaved", rope.get("interleaved", True)):
        raise ConfigUnsupported("mrope_interleaved", "only interleaved sections are computed")
    return tuple(int(part) for part in section)


def _moe_layers(config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
    step = config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    if not isinstance(step, int) or step < 1:
        raise ConfigUnsupported("decoder_sparse_step", f"{step!r} is not a whole number from 1")
    return frozenset(n for n in range(num_layers) if n not in dense and (n + 1) % step == 0)
