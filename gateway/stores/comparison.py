"""Compares a store with its checkpoint, layer by layer: our own code on the one, `transformers` on the other.

Both get the same input rows; the published program's output is the next layer's input. One layer is in memory at a
time, first theirs, then ours. Called by `gateway.stores.compare_command`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experts.store import ExpertStore
from extraction.errors import OptionRefused
from extraction.manifest import Component
from extraction.plan import ExtractionPlan, plan_extraction
from gateway.byte_sizes import format_bytes
from gateway.errors import ComparisonRefused, OptionInvalid
from gateway.stores.layer_difference import TOLERANCE, LayerDifference, measure
from gateway.stores.published_layers import PublishedLayers
from router.model_config import ModelConfig
from router.single_layer import SingleLayers

MIB = 1 << 20
FIXED_BYTES = 64 * MIB
"""What libraries allocate beside weights and rows."""


@dataclass(frozen=True)
class ComparisonOptions:
    """What a user may choose."""

    layers: frozenset[int] | None = None
    """None means all that the store has."""
    num_tokens: int = 128
    seed: int = 0
    memory_bytes: int = 4 * 1024 * MIB
    """For a layer's weights and rows, above what the program takes without a model."""


@dataclass(frozen=True)
class Comparison:
    """What was found."""

    layers: tuple[LayerDifference, ...]
    quantization: str | None = None
    """What of the store's layers is quantised, which takes them out of any tolerance; None where nothing is."""

    @property
    def is_within(self) -> bool:
        return all(layer.is_within for layer in self.layers)

    def as_json(self) -> dict[str, object]:
        return {
            "tolerance": TOLERANCE,
            "is_within": self.is_within,
            "quantization": self.quantization,
            "layers": [layer.as_json() for layer in self.layers],
        }


def compare(
    checkpoint: Path, root: Path, options: ComparisonOptions, show: Callable[[LayerDifference], None]
) -> Comparison:
    """show: called with each layer as soon as it is done.

    Raises ComparisonRefused where the two do not belong together or do not fit the memory, ExtraMissing, OptionInvalid,
    OptionRefused, or what reading them raises.
    """
    plan = plan_extraction(checkpoint)
    store = ExpertStore.open(root)
    try:
        component = _compared_component(plan, store)
        wanted = _wanted_layers(plan, store, options.layers)
        published, ours = PublishedLayers(plan), SingleLayers(store, component)
        budgets = _expert_budgets(published, ours.config, options, max(wanted))
        hidden_TD = published.embed(_token_ids(ours.config, options))
        found = []
        for index in range(max(wanted) + 1):
            theirs = published.compute(index, hidden_TD)
            if index in wanted:
                output = ours.compute(index, hidden_TD, budgets[index])
                found.append(measure(index, output, theirs))
                show(found[-1])
            hidden_TD = theirs.hidden_TD
    finally:
        store.close()
    return Comparison(tuple(found), replace(store.quantised, head=None).name)


def _compared_component(plan: ExtractionPlan, store: ExpertStore) -> Component:
    """The decoder that answers text. Raises ComparisonRefused where the store is not this checkpoint's."""
    manifest, served = store.manifest, plan.components[0]
    if manifest.family != plan.family:
        raise ComparisonRefused(
            str(store.root), f"holds a {manifest.family}, {plan.source} is a {plan.family}"
        )
    differing = sorted(
        key
        for key in manifest.config.keys() | plan.config.keys()
        if _text(manifest.config.get(key)) != _text(plan.config.get(key))
    )
    if differing:
        reason = f"was not made from {plan.source}: their config.json differ in {', '.join(differing[:5])}"
        raise ComparisonRefused(str(store.root), reason)
    if manifest.left_out is not None and manifest.left_out.groups is not None:
        raise ComparisonRefused(str(store.root), "leaves out experts of every layer")
    if served.name not in {component.name for component in manifest.components}:
        raise ComparisonRefused(str(store.root), f"leaves out {served.name}, the part that is compared")
    return store.component(served.name)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _wanted_layers(plan: ExtractionPlan, store: ExpertStore, wanted: frozenset[int] | None) -> frozenset[int]:
    """Raises OptionRefused for a layer that the checkpoint or the store does not have."""
    name, left_out = plan.components[0].name, store.manifest.left_out
    absent = frozenset(left_out.layers.get(name, ()) if left_out is not None else ())
    decoder = {int(part.split(".")[1]) for part in plan.components[0].backbone if part.startswith("layers.")}
    if wanted is None:
        return frozenset(decoder - absent)
    for layer in sorted(wanted):
        if layer not in decoder or layer in absent:
            owner = "store" if layer in decoder else "checkpoint"
            raise OptionRefused("--layers", f"the {owner} has no layer {layer}")
    return wanted


def _token_ids(config: ModelConfig, options: ComparisonOptions) -> Sequence[int]:
    """Random ones: a text would need a tokenizer, and use few experts. Raises OptionInvalid."""
    if options.num_tokens > config.max_position_embeddings:
        raise OptionInvalid("--tokens", f"is beyond the model's context of {config.max_position_embeddings}")
    generator = torch.Generator().manual_seed(options.seed)
    ids: list[int] = torch.randint(config.vocab_size, (options.num_tokens,), generator=generator).tolist()
    return ids


def _expert_budgets(
    published: PublishedLayers, config: ModelConfig, options: ComparisonOptions, last: int
) -> list[int]:
    """What our side of each layer may take for experts. Raises ComparisonRefused when a layer does not fit.

    Both sides are counted together, although they are computed one after the other: what is freed may stay with the
    process.
    """
    rows = _row_bytes(config, options.num_tokens)
    expert = 3 * config.hidden_size * config.expert_width * 4
    budgets = []
    for index in range(last + 1):
        weights = published.layer_bytes(index)
        experts = expert * config.num_experts if index in config.moe_layers else 0
        others = 2 * (weights - experts)  # as stored and as computed with, while a layer is read
        least = FIXED_BYTES + rows + weights + others + expert  # an expert is converted while it is read
        needed = least + expert
        if needed > options.memory_bytes:
            reason = (
                f"{format_bytes(options.memory_bytes)} is too little: layer {index} needs {_rounded(needed)}"
            )
            raise ComparisonRefused("--memory", reason)
        budgets.append(options.memory_bytes - least)
    return budgets


def _row_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Most that one layer's rows take at a time on either side: scores of all heads and their copies, or what experts
    make of every token."""
    scores = 4 * config.num_heads * num_tokens
    widest = max((*config.gated_widths(), config.q_width, config.hidden_size))
    activations = 8 * config.experts_per_token * (config.hidden_size + 2 * widest)
    return 4 * num_tokens * (scores + activations)


def _rounded(num_bytes: int) -> str:
    return format_bytes(-(-num_bytes // (100 * MIB)) * 100 * MIB)
