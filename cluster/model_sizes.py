"""What a model takes, in bytes, known from its configuration alone: no weight and no store is needed.

The same numbers as `router.footprint` gives for a store (a test compares them). Called by `sage-moe plan` and the
simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.demand import Demand, uniform_demand
from experts.numerics import RowKernel
from experts.quantised import QuantisedForm, planned_product
from extraction.component_layout import ComponentLayout
from extraction.layouts import Layout, layout_for
from extraction.manifest import ROLES, SCALE_ROLES, ExpertKey, ExpertRecord, RecordPart
from extraction.quantise import Quantization
from extraction.quantised_parts import NOT_QUANTISED, QuantisedParts
from router.attention import BLOCK_POSITIONS
from router.batcher import BatchLimits
from router.footprint import actor_buffer_bytes, buffer_bytes, packed_backbone_bytes, weight_bytes
from router.kv_cache import KvPool, blocks_for
from router.linears import planned_linears
from router.media.facts import FAMILY
from router.media.sizes import media_bytes
from router.model_config import ModelConfig, read_model_config
from router.speech.facts import PARTS_THAT_SPEAK, TALKER
from router.speech.sizes import speech_bytes


@dataclass(frozen=True)
class ModelSizes:
    """One decoder, in the dtype that is computed in."""

    component: str
    config: ModelConfig
    dtype: torch.dtype
    expert_bytes: int
    """Of one expert in memory."""
    backbone_bytes: int
    active_bytes: int
    """Of the backbone that every token reads: all but the embeddings, of which it takes a row."""
    media_bytes: int = 0
    """Of what sees and hears."""
    speech_bytes: int = 0
    """Of what speaks, its own experts included."""

    @property
    def row_bytes(self) -> int:
        """One token's activations on the wire."""
        return self.config.hidden_size * self.dtype.itemsize

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return len(self.config.moe_layers) * self.config.num_experts

    @property
    def total_expert_bytes(self) -> int:
        return self.num_experts * self.expert_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.config.kv_elements_per_position * self.dtype.itemsize

    def kv_bytes(self, context: int, num_streams: int) -> int:
        """A cache in which so many sequences of this length have room, with the block that is always zero."""
        return (num_streams * blocks_for(context) + 1) * KvPool.block_bytes(self.config, self.dtype)

    def context_in(self, num_bytes: int, num_streams: int) -> int:
        """Tokens of each of some sequences that a cache of so many bytes holds, up to the model's context."""
        blocks = num_bytes // KvPool.block_bytes(self.config, self.dtype) - 1
        return min(self.config.max_position_embeddings, max(0, blocks // num_streams) * BLOCK_POSITIONS)

    def router_buffers(self, limits: BatchLimits, kv_bytes: int) -> int:
        num_blocks = kv_bytes // KvPool.block_bytes(self.config, self.dtype)
        return buffer_bytes(self.config, self.dtype, limits, num_blocks)

    def actor_buffers(self, limits: BatchLimits) -> int:
        return actor_buffer_bytes(self.config, self.dtype, limits)

    def expert_sizes(self) -> dict[ExpertKey, int]:
        numbers = range(self.config.num_experts)
        return {
            ExpertKey(self.component, layer, expert): self.expert_bytes
            for layer in sorted(self.config.moe_layers)
            for expert in numbers
        }

    def uniform_demand(self) -> Demand:
        return uniform_demand(self.expert_sizes(), self.config.experts_per_token, self.row_bytes)


def measure_model(
    config: Mapping[str, Any], dtype: torch.dtype, quantised: QuantisedParts = NOT_QUANTISED
) -> ModelSizes:
    """config: a published `config.json`; of several decoders the one that answers text counts.

    Raises FamilyUnknown, ConfigInvalid or ConfigUnsupported.
    """
    layout = layout_for(config)
    component = layout.components[0]
    decoder = read_model_config(component.config)
    backbone = _backbone_bytes(component, decoder, dtype, quantised)
    configs = {part.name: part.config for part in layout.components}
    is_head = decoder.has_tied_head and quantised.head is None
    embeddings = 0 if is_head else decoder.vocab_size * decoder.hidden_size * dtype.itemsize
    return ModelSizes(
        component.name,
        decoder,
        dtype,
        _expert_bytes(decoder, dtype, quantised.experts),
        backbone,
        backbone - embeddings,
        media_bytes(configs, dtype) if layout.family == FAMILY else 0,
        _speech_bytes(layout, dtype, quantised) if configs.keys() >= PARTS_THAT_SPEAK else 0,
    )


def _backbone_bytes(
    component: ComponentLayout, config: ModelConfig, dtype: torch.dtype, quantised: QuantisedParts
) -> int:
    shapes = component.backbone_shapes.items()
    plain = {name: shape for name, shape in shapes if quantised.of_tensor(name) is None}
    packed = packed_backbone_bytes(config, planned_linears(quantised, dtype))
    return packed + weight_bytes(plain, config, dtype)


def _speech_bytes(layout: Layout, dtype: torch.dtype, quantised: QuantisedParts) -> int:
    talker = next(part for part in layout.components if part.name == TALKER)
    config = read_model_config(talker.config)
    num_experts = len(config.moe_layers) * config.num_experts
    experts = num_experts * _expert_bytes(config, dtype, quantised.experts)
    configs = {part.name: part.config for part in layout.components}
    talker_bytes = _backbone_bytes(talker, config, dtype, quantised)
    return experts + speech_bytes(configs, talker_bytes, dtype, planned_linears(quantised, dtype))


def _expert_bytes(config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None) -> int:
    gate, down = (config.expert_width, config.hidden_size), (config.hidden_size, config.expert_width)
    if quantization is None:
        return 3 * config.expert_width * config.hidden_size * dtype.itemsize
    shapes = (gate, gate, down)
    sizes = [*map(quantization.code_bytes, shapes), *map(quantization.scale_bytes, shapes)]
    parts = [RecordPart(role, "", 0, size) for role, size in zip((*ROLES, *SCALE_ROLES), sizes, strict=True)]
    record = ExpertRecord(ExpertKey("model", 0, 0), quantization.scheme, None, tuple(parts))
    form = QuantisedForm(
        quantization, dtype, {"model": config.hidden_size}, RowKernel(1), planned_product(dtype)
    )
    return form.loaded_bytes(record)
