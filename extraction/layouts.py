"""Family tables: what a tensor's published name means, and which tensors a configuration implies.

One entry a family. Pure; called by `extraction.plan`. Canonical names of the backbone are the published ones
without the leading `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extraction.errors import FamilyUnknown, ManifestInvalid, TensorUnexpected
from extraction.manifest import ROLES, ExpertKey

MAX_EXPERTS = 1 << 18
"""Of all layers; ten times the largest published model. Bounds what a hostile configuration can make us allocate."""
MAX_LAYERS = 4096
_NUMBER = "0|[1-9][0-9]{0,5}"
"""One spelling a number: neither leading zeros nor other scripts' digits."""


@dataclass(frozen=True)
class ExpertTensor:
    """One projection of one expert."""

    key: ExpertKey
    role: str


@dataclass(frozen=True)
class BackboneTensor:
    """A tensor of a component's backbone under its canonical name."""

    component: str
    name: str


@dataclass(frozen=True)
class Layout:
    """What a checkpoint of one family and configuration must hold."""

    family: str
    component: str
    config: Mapping[str, Any]
    expert_pattern: re.Pattern[str]
    role_of: Mapping[str, str]
    backbone_prefix: str
    expert_shapes: Mapping[str, tuple[int, int]]
    experts: frozenset[ExpertKey]
    backbone_shapes: Mapping[str, tuple[int, ...]]

    def place(self, name: str, shape: tuple[int, ...]) -> ExpertTensor | BackboneTensor:
        """What the tensor is. Raises TensorUnexpected for a name or shape that the configuration does not imply."""
        match = self.expert_pattern.fullmatch(name)
        if match:
            role = self.role_of[match["role"]]
            key = ExpertKey(self.component, int(match["layer"]), int(match["expert"]))
            if key not in self.experts:
                raise TensorUnexpected(name, "the configuration has no such expert")
            _check_shape(name, shape, self.expert_shapes[role])
            return ExpertTensor(key, role)
        canonical = name.removeprefix(self.backbone_prefix)
        expected = self.backbone_shapes.get(canonical)
        if expected is None:
            raise TensorUnexpected(name, f"is not known in family {self.family}")
        _check_shape(name, shape, expected)
        return BackboneTensor(self.component, canonical)

    def is_ignored(self, name: str) -> bool:
        """Tensors that some programs write although the configuration does not use them."""
        is_tied_head = name == "lm_head.weight" and "lm_head.weight" not in self.backbone_shapes
        return is_tied_head or name.endswith("rotary_emb.inv_freq")

    def expected(self) -> set[ExpertTensor | BackboneTensor]:
        """Everything that must be there."""
        experts = {ExpertTensor(key, role) for key in self.experts for role in ROLES}
        return experts | {BackboneTensor(self.component, name) for name in self.backbone_shapes}

    def published_name(self, tensor: ExpertTensor | BackboneTensor) -> str:
        """The name under which a missing tensor is reported."""
        if isinstance(tensor, ExpertTensor):
            return f"layer {tensor.key.layer} expert {tensor.key.expert} {tensor.role}"
        return tensor.name


def layout_for(config: Mapping[str, Any]) -> Layout:
    """Raises FamilyUnknown with the known ones, or ManifestInvalid for a damaged configuration."""
    model_type = config.get("model_type")
    builder = _FAMILIES.get(str(model_type))
    if builder is None:
        raise FamilyUnknown(str(model_type), tuple(sorted(_FAMILIES)))
    return builder(config)


def _qwen3_moe(config: Mapping[str, Any]) -> Layout:
    width, layers = _size(config, "hidden_size"), _size(config, "num_hidden_layers")
    experts = _size(config, "num_local_experts" if "num_local_experts" in config else "num_experts")
    expert_width = _size(config, "moe_intermediate_size")
    if layers * experts > MAX_EXPERTS:
        raise ManifestInvalid(
            "config.json", f"{layers} layers of {experts} experts are more than {MAX_EXPERTS}"
        )
    if layers > MAX_LAYERS:
        raise ManifestInvalid("config.json", f"{layers} layers are more than {MAX_LAYERS}")
    per_token = _size(config, "num_experts_per_tok")
    if per_token > experts:
        raise ManifestInvalid("config.json", f"num_experts_per_tok: {per_token} of {experts} experts")
    moe_layers = _moe_layers(config, layers)
    return Layout(
        family="qwen3_moe",
        component="model",
        config=config,
        expert_pattern=re.compile(
            rf"model\.layers\.(?P<layer>{_NUMBER})\.mlp\.experts\.(?P<expert>{_NUMBER})\.(?P<role>gate|up|down)_proj\.weight"
        ),
        role_of={role: role for role in ROLES},
        backbone_prefix="model.",
        expert_shapes={
            "gate": (expert_width, width),
            "up": (expert_width, width),
            "down": (width, expert_width),
        },
        experts=frozenset(
            ExpertKey("model", layer, expert) for layer in moe_layers for expert in range(experts)
        ),
        backbone_shapes=_decoder_shapes(config, set(moe_layers), experts),
    )


_FAMILIES = {"qwen3_moe": _qwen3_moe}


def _decoder_shapes(
    config: Mapping[str, Any], moe_layers: set[int], experts: int
) -> dict[str, tuple[int, ...]]:
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", heads)
    head_dim = _size(config, "head_dim", max(1, width // heads))
    vocab = _size(config, "vocab_size")
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, width), "norm.weight": (width,)}
    if not _flag(config, "tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(_size(config, "num_hidden_layers")):
        prefix = f"layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (heads * head_dim, width),
            prefix + "self_attn.k_proj.weight": (kv_heads * head_dim, width),
            prefix + "self_attn.v_proj.weight": (kv_heads * head_dim, width),
            prefix + "self_attn.o_proj.weight": (width, heads * head_dim),
            prefix + "self_attn.q_norm.weight": (head_dim,),
            prefix + "self_attn.k_norm.weight": (head_dim,),
        }
        if layer in moe_layers:
            shapes[prefix + "mlp.gate.weight"] = (experts, width)
        else:
            dense = _size(config, "intermediate_size")
            shapes |= {
                prefix + "mlp.gate_proj.weight": (dense, width),
                prefix + "mlp.up_proj.weight": (dense, width),
                prefix + "mlp.down_proj.weight": (width, dense),
            }
    return shapes


def _moe_layers(config: Mapping[str, Any], layers: int) -> list[int]:
    step = _size(config, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ManifestInvalid("config.json", f"mlp_only_layers: {dense!r} is no list of whole numbers")
    chosen = set(range(layers)) - set(dense)
    return [layer for layer in sorted(chosen) if (layer + 1) % step == 0]


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 24:
        raise ManifestInvalid("config.json", f"{key}: {value!r} is not a whole number from 1 to {1 << 24}")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, False, True):
        raise ManifestInvalid("config.json", f"{key}: {value!r} is neither true nor false")
    return bool(value)


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise TensorUnexpected(name, f"has shape {list(shape)}, the configuration implies {list(expected)}")
