"""What an engine holds beside its experts, in bytes, known from the store's description before a weight is read.

Called by `cluster.memory_plan`'s callers. The backbone's and the cache's bytes are exact; those of buffers are a bound
on what one step of a full batch has in memory at a time (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from experts.budget import ExpertBytes, measure_experts
from experts.numerics import MANY_ROWS
from experts.quantised import planned_form
from experts.store import ExpertStore
from extraction.manifest import ITEM_SIZES, Component
from extraction.quantised_parts import HEAD
from router.attention import BLOCK_POSITIONS, MAX_SCORE_ELEMENTS
from router.batcher import BatchLimits
from router.effort import EffortChoice, experts_at
from router.kv_cache import KvPool, blocks_for
from router.linears import FLOAT, LinearForms, planned_linears
from router.loading import EngineOptions, chosen_dtype, num_kv_blocks
from router.media.facts import read_media_facts
from router.media.sizes import media_bytes
from router.model_config import SHARED_GATE_ROWS, ModelConfig, read_model_config
from router.output_means import means_bytes
from router.sampling import TOGETHER_BYTES
from router.speech.facts import TALKER, read_speech_facts
from router.speech.sizes import speech_bytes

FLOAT32_BYTES = 4
LIBRARY_BYTES = 32 << 20
"""Scratch memory of matrix libraries and threads' stacks."""
KEPT_BLOCKS = 2
ROW_BYTES = 100
"""Of an expert's row, as numbers of Python and PyTorch: its expert, token, weight, rank and place."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one engine."""

    backbone_bytes: int
    kv_bytes: int
    swap_bytes: int
    """Most that swapped-out sequences take in host memory; none where the cache holds every sequence whole."""
    buffer_bytes: int
    actor_buffer_bytes: int
    """Of an expert actor that works for it."""
    experts: ExpertBytes
    experts_per_token: int
    stand_in_bytes: int = 0
    """Mean outputs of experts, where a request may ask for them."""
    media_bytes: int = 0
    """Of what sees and hears, in host memory, where images and sound are taken."""
    speech_bytes: int = 0
    """Of what speaks, its own experts included, in host memory, where replies are spoken."""


def measure_footprint(store: ExpertStore, options: EngineOptions) -> Footprint:
    """Raises ConfigUnsupported, or what reading the store raises."""
    dtype = chosen_dtype(store, options)
    component = store.served
    config = read_model_config(component.config)
    block_bytes = KvPool.block_bytes(config, dtype)
    num_blocks = num_kv_blocks(config, dtype, options)
    most_blocks = options.limits.max_running * blocks_for(config.max_position_embeddings)
    if options.max_model_len:
        most_blocks = options.limits.max_running * blocks_for(options.max_model_len)
    return Footprint(
        backbone_bytes=backbone_bytes(
            component, config, dtype, planned_linears(store.quantised, dtype, options.device)
        ),
        kv_bytes=num_blocks * block_bytes,
        swap_bytes=options.kv_budget_bytes if num_blocks <= most_blocks else 0,
        buffer_bytes=buffer_bytes(config, dtype, options.limits, num_blocks, options.efforts),
        actor_buffer_bytes=actor_buffer_bytes(config, dtype, options.limits, options.efforts),
        experts=measure_experts(
            store,
            store.expert_keys(component.name),
            planned_form(store, dtype, {component.name: config.hidden_size}, options.device),
        ),
        experts_per_token=config.experts_per_token,
        stand_in_bytes=means_bytes(config.num_experts, config.hidden_size, len(config.moe_layers))
        if options.has_stand_ins
        else 0,
        media_bytes=media_bytes({part.name: part.config for part in store.manifest.components}, dtype)
        if options.has_media and read_media_facts(store.manifest, store.root).kinds
        else 0,
        speech_bytes=_speech_bytes(store, dtype, options)
        if options.has_speech and read_speech_facts(store.manifest) is not None
        else 0,
    )


def _speech_bytes(store: ExpertStore, dtype: torch.dtype, options: EngineOptions) -> int:
    """Its experts are on the CPU whatever computes the text."""
    component, budget = store.component(TALKER), options.speech_budget_bytes
    config = read_model_config(component.config)
    form = planned_form(store, dtype, {TALKER: config.hidden_size})
    experts = measure_experts(store, store.expert_keys(TALKER), form).total
    forms = planned_linears(store.quantised, dtype)
    return (experts if budget is None else min(budget, experts)) + speech_bytes(
        {part.name: part.config for part in store.manifest.components},
        backbone_bytes(component, config, dtype, forms),
        dtype,
        forms,
    )


def backbone_bytes(
    component: Component, config: ModelConfig, dtype: torch.dtype, forms: LinearForms = FLOAT
) -> int:
    """What `Backbone.nbytes` will be."""
    plain = {tensor.name: tensor.shape for tensor in component.tensors if tensor.dtype in ITEM_SIZES}
    return packed_backbone_bytes(config, forms) + weight_bytes(plain, config, dtype)


def packed_backbone_bytes(config: ModelConfig, forms: LinearForms) -> int:
    """Of the quantised matrices, as they are packed; a tied head that is quantised lies beside its embedding."""
    packed = 0
    if forms.backbone is not None:
        packed += sum(map(forms.backbone.loaded_bytes, config.backbone_matrices()))
    if forms.head is not None:
        packed += forms.head.loaded_bytes((config.vocab_size, config.hidden_size))
    return packed


def weight_bytes(shapes: Mapping[str, Sequence[int]], config: ModelConfig, dtype: torch.dtype) -> int:
    """Of a backbone's unquantised tensors of these shapes, by canonical name."""
    elements = 0
    for name, (rows, *rest) in shapes.items():
        if config.has_tied_head and name == HEAD:
            continue
        if name.endswith("shared_expert_gate.weight"):
            rows = SHARED_GATE_ROWS
        elements += rows * torch.Size(rest).numel()
    return elements * dtype.itemsize


def buffer_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    limits: BatchLimits,
    num_blocks: int,
    efforts: Sequence[EffortChoice] = ("focus",),
) -> int:
    """Bound on the tensors that a step holds beside weights and cache: the largest of its phases, the rows of a pass
    that pauses meanwhile (`router.open_passes`), the blocks that the C source computes halves of layers in and keeps
    (`experts/native/memory.c`), and the library's own. Counts follow `router.backbone` and `experts.ffn`."""
    item, rows = dtype.itemsize, _rows(limits)
    hidden = rows * config.hidden_size * (5 * item + 2 * FLOAT32_BYTES)
    phases = (
        _attention(config, rows, num_blocks, item),
        _experts(config, rows, item, efforts),
        _head(config, limits, item),
    )
    return LIBRARY_BYTES + hidden + KEPT_BLOCKS * _half_a_layer(config, rows, item) + max(phases)


def actor_buffer_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    limits: BatchLimits,
    efforts: Sequence[EffortChoice] = ("focus",),
) -> int:
    """The same of an expert actor: a step's rows as they come, are computed and go."""
    return LIBRARY_BYTES + _experts(config, _rows(limits), dtype.itemsize, efforts)


def _half_a_layer(config: ModelConfig, rows: int, item: int) -> int:
    """What a half that pauses in the middle holds, the largest of attention, experts with the one that every row
    passes, and a layer without experts; `experts/native/layer.c` cuts it. Packed rows may be float32."""
    attention = config.q_width * (2 * FLOAT32_BYTES + item) + (config.q_width + 2 * config.kv_width) * item
    packed, numbers = config.hidden_size * FLOAT32_BYTES, 3 * FLOAT32_BYTES * 2
    of_expert = config.expert_width * FLOAT32_BYTES + config.hidden_size * item + numbers
    experts = config.num_experts * item + config.experts_per_token * of_expert
    if config.shared_width is not None:
        experts += packed + config.shared_width * FLOAT32_BYTES + (config.hidden_size + 1) * item
    dense = (config.dense_width or 0) * FLOAT32_BYTES
    return rows * (packed + max(attention, experts, dense))


def _rows(limits: BatchLimits) -> int:
    """Rows of a full step, padded for the row kernel."""
    return limits.max_batch_tokens + BLOCK_POSITIONS


def _attention(config: ModelConfig, rows: int, num_blocks: int, item: int) -> int:
    """Projections before and after rotation; scores with their softmax; keys and values of one layer, gathered as
    they are stored, as float32, and laid out for the product."""
    projected = rows * (config.q_width + 2 * config.kv_width) * (2 * item + 3 * FLOAT32_BYTES)
    scores = 3 * MAX_SCORE_ELEMENTS * FLOAT32_BYTES
    gathered = 2 * num_blocks * BLOCK_POSITIONS * config.kv_width * (item + 2 * FLOAT32_BYTES)
    return projected + scores + gathered


def _experts(config: ModelConfig, rows: int, item: int, efforts: Sequence[EffortChoice]) -> int:
    """The larger of what a library's products leave, which have MANY_ROWS rows at most: rows gathered, their gated
    projections, their answers sorted and summed in float32; and our own: answers in parts, joined, and looked at in
    float32, and where each comes from and goes. Of as many experts a token as a request may ask for."""
    widest, width = max(config.gated_widths(), default=0), config.hidden_size
    num_ranks = config.experts_per_token
    if config.moe_layers and {"crisis", "auto"} & {*efforts}:
        num_ranks = experts_at("crisis", num_ranks, config.num_experts)
    gathered = min(rows, MANY_ROWS + BLOCK_POSITIONS) * num_ranks
    if config.moe_layers:
        gathered += min(config.num_experts, gathered) * SHARED_GATE_ROWS
    by_library = gathered * (width + widest) * (4 * item + 2 * FLOAT32_BYTES)
    answered = rows * num_ranks
    of_answer = width * (2 * item + FLOAT32_BYTES) + widest * (item + FLOAT32_BYTES) + ROW_BYTES
    return max(by_library, answered * of_answer)


def _head(config: ModelConfig, limits: BatchLimits, item: int) -> int:
    """Logits of every running sequence, and what sampling makes, in float64, of one row or of some together."""
    row = config.vocab_size
    sampling = max(8 * row * 2 * FLOAT32_BYTES, 3 * TOGETHER_BYTES)
    return limits.max_running * row * (item + FLOAT32_BYTES) + sampling
