"""What a store holds and how much memory it takes, computed from its manifest and index: `sage-moe inspect`.

Counts weights only: KV cache and buffers come on top and are the engine's to report. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from extraction.decoder_config import MAX_EXPERTS, MAX_LAYERS
from extraction.errors import ManifestInvalid
from extraction.expert_index import INDEX_NAME, read_expert_index
from extraction.file_lengths import files_cut_short
from extraction.manifest import (
    MANIFEST_NAME,
    Component,
    ExpertKey,
    ExpertRecord,
    Manifest,
    read_manifest,
    store_hash,
)

KINDS = ("embeddings", "attention", "norms", "gates", "dense", "shared", "head")


@dataclass(frozen=True)
class ResidencyTotal:
    """Weights of a whole process that keeps this many experts of each layer."""

    state: str
    experts_per_layer: int
    expert_bytes: int
    total_bytes: int
    reduction: float
    """Of the whole process against all experts resident, 0 to 1."""


@dataclass(frozen=True)
class MemoryRow:
    """One row of the memory table: a component with all experts, and with k experts a layer."""

    component: str
    monolithic_bytes: int
    selective_bytes: int
    reduction: float


@dataclass(frozen=True)
class ComponentRow:
    """One component of the store, whole."""

    name: str
    is_served: bool
    num_moe_layers: int
    num_experts: int
    backbone_bytes: int
    expert_bytes: int
    """Of all its experts."""


@dataclass(frozen=True)
class StoreSummary:
    """The object that `--json` prints; keys are stable. Where not said otherwise, of the decoder that is served."""

    store: str
    hash: str
    family: str
    kind: str
    dtype: str
    num_layers: int
    num_moe_layers: int
    experts_per_layer: int
    experts_per_token: int
    num_experts: int
    expert_bytes: int
    """Of one expert; of the largest where dtypes differ."""
    totals: tuple[ResidencyTotal, ...]
    bytes_by_component: Mapping[str, int]
    memory_table: tuple[MemoryRow, ...]
    components: tuple[ComponentRow, ...]
    """All of the store."""
    quantization: Mapping[str, Any] | None
    """Scheme and group size of the experts; None where they are as published."""
    backbone_quantization: Mapping[str, Any] | None
    """The same of the decoders' linear layers."""
    head_quantization: Mapping[str, Any] | None
    """The same of the head."""
    left_out: Mapping[str, Any] | None
    """Components, and layers by component, that a partial store lacks; None in a whole one."""

    files_cut_short: tuple[str, ...] = ()
    """Weight files that are missing, or end too early: what lies behind their ends cannot be computed with."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(root: Path) -> StoreSummary:
    """Raises ManifestInvalid or PathRefused."""
    manifest = read_manifest(root)
    index = read_expert_index(root, manifest)
    component = _shown(manifest, index)
    records = _records(index, component)
    if not records:
        raise ManifestInvalid(INDEX_NAME, f"has no experts of component {component.name!r}")
    layers = _sizes_by_layer(records)
    experts = max(map(len, layers.values()))
    backbone = _backbone_bytes(component)
    is_share = manifest.left_out is not None and manifest.left_out.groups is not None
    per_token = _number(component, "num_experts_per_tok", MAX_EXPERTS if is_share else experts)
    return StoreSummary(
        store=str(root),
        hash=store_hash(root),
        family=manifest.family,
        kind=manifest.kind,
        dtype=", ".join(sorted({record.dtype for record in records})),
        num_layers=_number(component, "num_hidden_layers", MAX_LAYERS),
        num_moe_layers=len(layers),
        experts_per_layer=experts,
        experts_per_token=per_token,
        num_experts=len(records),
        expert_bytes=max(record.nbytes for record in records),
        totals=_totals(layers, min(per_token, experts), sum(backbone.values())),
        bytes_by_component=backbone | {"experts": _resident_bytes(layers, experts)},
        memory_table=_memory_table(backbone, layers, min(per_token, experts)),
        components=tuple(_row(part, index, part is component) for part in manifest.components),
        quantization=_as_json(manifest.quantization),
        backbone_quantization=_as_json(manifest.backbone_quantization),
        head_quantization=_as_json(manifest.head_quantization),
        left_out=_as_json(manifest.left_out),
        files_cut_short=files_cut_short(root, manifest, index),
    )


def _as_json(model: BaseModel | None) -> dict[str, Any] | None:
    return None if model is None else model.model_dump(mode="json")


def _shown(manifest: Manifest, index: Mapping[ExpertKey, ExpertRecord]) -> Component:
    """The decoder that is served; where a partial store leaves it out, the first one with experts."""
    names = {key.component for key in index}
    with_experts = [component for component in manifest.components if component.name in names]
    return with_experts[0] if manifest.left_out is not None and with_experts else manifest.served


def _records(index: Mapping[ExpertKey, ExpertRecord], component: Component) -> list[ExpertRecord]:
    return [record for key, record in sorted(index.items()) if key.component == component.name]


def _row(component: Component, index: Mapping[ExpertKey, ExpertRecord], is_served: bool) -> ComponentRow:
    records = _records(index, component)
    return ComponentRow(
        component.name,
        is_served,
        num_moe_layers=len({record.key.layer for record in records}),
        num_experts=len(records),
        backbone_bytes=sum(tensor.nbytes for tensor in component.tensors),
        expert_bytes=sum(record.nbytes for record in records),
    )


def _sizes_by_layer(records: Iterable[ExpertRecord]) -> dict[int, list[int]]:
    """Bytes of each layer's experts, largest first: experts of other dtypes have other sizes."""
    layers: dict[int, list[int]] = {}
    for record in records:
        layers.setdefault(record.key.layer, []).append(record.nbytes)
    return {layer: sorted(sizes, reverse=True) for layer, sizes in layers.items()}


def _resident_bytes(layers: Mapping[int, list[int]], kept: int) -> int:
    """Of the `kept` largest experts of each layer: what must fit whichever are chosen."""
    return sum(sum(sizes[:kept]) for sizes in layers.values())


def _number(component: Component, name: str, largest: int) -> int:
    value = component.config.get(name)
    if type(value) is not int or not 1 <= value <= largest:
        raise ManifestInvalid(MANIFEST_NAME, f"{name}: {value!r} is not from 1 to {largest}")
    return value


def _backbone_bytes(component: Component) -> dict[str, int]:
    sizes = dict.fromkeys(KINDS, 0)
    for tensor in component.tensors:
        sizes[_kind(tensor.name)] += tensor.nbytes
    return sizes


def _kind(name: str) -> str:
    if name.startswith("embed_tokens."):
        return "embeddings"
    if name.startswith("lm_head."):
        return "head"
    if name.endswith("norm.weight"):
        return "norms"
    if name.endswith(".mlp.gate.weight"):
        return "gates"
    if ".mlp.shared_expert" in name:
        return "shared"
    return "attention" if ".self_attn." in name else "dense"


def _totals(
    layers: Mapping[int, list[int]], per_token: int, backbone_bytes: int
) -> tuple[ResidencyTotal, ...]:
    """At half, one and two times the experts per token, and with all of them; least memory first."""
    experts = max(map(len, layers.values()))
    whole = backbone_bytes + _resident_bytes(layers, experts)
    half, double = max(1, per_token // 2), min(experts, 2 * per_token)
    states = {
        half: f"WAKE (k={half}, reduced)",
        double: f"CRISIS (k={double})",
        per_token: f"FOCUS (k={per_token}, native)",
    }
    rows = []
    for kept, state in [*sorted(states.items()), (experts, "all experts")]:
        resident = _resident_bytes(layers, kept)
        total = backbone_bytes + resident
        rows.append(ResidencyTotal(state, kept, resident, total, 1 - total / whole))
    return tuple(rows)


def _memory_table(
    backbone: Mapping[str, int], layers: Mapping[int, list[int]], per_token: int
) -> tuple[MemoryRow, ...]:
    """The whole process first, then its parts, then one layer's experts alone."""
    first = min(layers)
    everything, selective = (
        _resident_bytes(layers, kept) for kept in (max(map(len, layers.values())), per_token)
    )
    fixed = sum(backbone.values())
    rows = [("whole process", fixed + everything, fixed + selective)]
    rows += [(kind, nbytes, nbytes) for kind, nbytes in backbone.items() if nbytes]
    rows.append((f"experts, {len(layers)} layers", everything, selective))
    rows.append((f"of which layer {first}", sum(layers[first]), sum(layers[first][:per_token])))
    return tuple(MemoryRow(name, all_of_it, kept, 1 - kept / all_of_it) for name, all_of_it, kept in rows)
