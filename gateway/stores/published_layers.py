"""A checkpoint's decoder layers as `transformers` computes them, one in memory at a time.

The only file that imports `transformers`, an optional extra. The model is the library's own class, built without
memory; a layer's weights are read from the shards when it is computed, in float32, and go afterwards. What the names of
published tensors mean is said here anew, so that a mistake in `extraction.layouts` does not go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from extraction.plan import ExtractionPlan, SourceTensor
from gateway.errors import ComparisonRefused, ExtraMissing
from router.single_layer import LayerOutput

DTYPE = torch.float32
MODEL_CLASSES: Mapping[str, str] = {
    "qwen3_moe": "Qwen3MoeModel",
    "qwen2_moe": "Qwen2MoeModel",
    "olmoe": "OlmoeModel",
    "mixtral": "MixtralModel",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
}
"""Decoders that answer text, by a checkpoint's `model_type`."""
_IN_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]+)\.(.+)")
_EXPERT = re.compile(
    r"(?:mlp|block_sparse_moe)\.experts\.([0-9]+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_GATES, _UPS = ("gate_proj", "w1"), ("up_proj", "w3")


class PublishedLayers:
    """The decoder of a planned checkpoint."""

    def __init__(self, plan: ExtractionPlan) -> None:
        """Raises ExtraMissing, or ComparisonRefused when `transformers` does not take the configuration."""
        served = plan.components[0]
        self._source = plan.source
        self._embeddings = served.backbone["embed_tokens.weight"]
        experts = (
            part for key, parts in plan.experts.items() if key.component == served.name for part in parts
        )
        self._tensors = _by_layer((*served.backbone.values(), *experts))
        self._model = _build(plan)
        self._empty_layers = list(self._model.layers)
        self._model.layers = nn.ModuleList(_PassOn() for _ in self._empty_layers)

    @property
    def num_layers(self) -> int:
        return len(self._empty_layers)

    def layer_bytes(self, index: int) -> int:
        """Of the layer's weights in float32, with the largest tensor as it is stored."""
        stored = max(tensor.header.nbytes for tensor in self._tensors[index].values())
        num_values: int = sum(parameter.numel() for parameter in self._empty_layers[index].parameters())
        return stored + num_values * DTYPE.itemsize

    def embed(self, token_ids: Iterable[int]) -> Tensor:
        """(T, D) float32 rows of the embedding."""
        from safetensors import safe_open

        with safe_open(str(self._source / self._embeddings.file), framework="pt") as file:
            rows = file.get_slice(self._embeddings.name)
            return torch.cat([rows[token : token + 1] for token in token_ids]).to(DTYPE)

    @torch.inference_mode()
    def compute(self, index: int, hidden_TD: Tensor) -> LayerOutput:
        """The layer's output for one text of T rows, positions 0 to T-1. Raises ComparisonRefused."""
        layer = self._empty_layers[index].to_empty(device="cpu")
        _fill(layer, self._source, self._tensors[index])
        seen: list[tuple[Tensor, ...]] = []
        if isinstance(gate := getattr(layer.mlp, "gate", None), nn.Module):
            gate.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        self._model.layers[index] = layer
        out_TD = self._model(inputs_embeds=hidden_TD[None], use_cache=False).last_hidden_state[0]
        self._model.layers[index] = _PassOn()
        self._empty_layers[index] = layer.to_empty(device="meta")
        if not seen:
            return LayerOutput(out_TD, None, None)
        (answer,) = seen
        if len(answer) != 3 or answer[2].dtype != torch.int64:
            raise ComparisonRefused("transformers", "has gates of another kind in this version")
        return LayerOutput(out_TD, answer[2], answer[0].float())


class _PassOn(nn.Module):
    """Stands for a layer that is not computed."""

    def forward(self, hidden_states: Tensor, **_others: Any) -> Tensor:
        return hidden_states


def _build(plan: ExtractionPlan) -> Any:
    """The decoder without memory for its weights, its last norm left out."""
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ImportError as error:
        raise ExtraMissing("compare", "transformers") from error
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.for_model(**plan.config)
        if plan.family == "qwen3_omni_moe":
            config = config.thinker_config.text_config
        kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
        with torch.device("meta"):
            model = getattr(transformers, MODEL_CLASSES[plan.family])._from_config(
                config, dtype=DTYPE, **kernels
            )
        model.rotary_emb = type(model.rotary_emb)(config)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ComparisonRefused(
            "transformers", f"does not take the checkpoint's config.json: {error}"
        ) from error
    model.norm = nn.Identity()
    return model.eval()


def _by_layer(tensors: Iterable[SourceTensor]) -> dict[int, dict[str, SourceTensor]]:
    """Layer -> what follows its number in a published name -> the tensor, whole."""
    layers: dict[int, dict[str, SourceTensor]] = {}
    for tensor in tensors:
        if match := _IN_LAYER.search(tensor.name):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    return layers


def _fill(layer: nn.Module, source: Path, tensors: Mapping[str, SourceTensor]) -> None:
    """Raises ComparisonRefused when the layer has other weights than the checkpoint."""
    from safetensors import safe_open

    parameters = dict(layer.named_parameters())
    missing = {name: parameter.numel() for name, parameter in parameters.items()}
    by_file: dict[str, list[str]] = {}
    for rest, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(rest)
    for file, names in by_file.items():
        with safe_open(str(source / file), framework="pt") as shard:
            for rest in names:
                name, target = _target(rest, parameters)
                value = shard.get_tensor(tensors[rest].name)
                if target is None or target.shape != value.shape:
                    raise ComparisonRefused("transformers", f"has no place for {tensors[rest].name}")
                target.copy_(value)
                missing[name] -= value.numel()
    unfilled = sorted(name for name, count in missing.items() if count)
    if unfilled:
        raise ComparisonRefused(
            "transformers", f"has weights that the checkpoint lacks: {', '.join(unfilled[:3])}"
        )


def _target(rest: str, parameters: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """The parameter, and the part of it, that a published tensor goes to; the library stacks a layer's experts."""
    match = _EXPERT.fullmatch(rest)
    if match is None:
        name = rest.replace("block_sparse_moe.", "mlp.")
        return name, parameters.get(name)
    expert, projection = int(match[1]), match[2]
    name = "mlp.experts.gate_up_proj" if projection in (*_GATES, *_UPS) else "mlp.experts.down_proj"
    stack = parameters.get(name)
    if stack is None or expert >= len(stack):
        return name, None
    if name.endswith("down_proj"):
        return name, stack[expert]
    gate, up = stack[expert].chunk(2)
    return name, gate if projection in _GATES else up
