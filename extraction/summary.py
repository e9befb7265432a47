"""What a store holds and how much memory it takes, computed from its manifest and index: `sage-moe inspect`.

Counts weights only: KV cache and buffers come on top and are the engine's to report. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extraction.errors import ManifestInvalid
from extraction.manifest import (
    MANIFEST_NAME,
    Component,
    ExpertKey,
    ExpertRecord,
    read_expert_index,
    read_manifest,
    store_hash,
)

KINDS = ("embeddings", "attention", "norms", "gates", "dense", "head")


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
class StoreSummary:
    """The object that `--json` prints; keys are stable."""

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
    """Of one expert."""
    totals: tuple[ResidencyTotal, ...]
    bytes_by_component: Mapping[str, int]
    memory_table: tuple[MemoryRow, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(root: Path) -> StoreSummary:
    """Raises ManifestInvalid or PathRefused."""
    manifest = read_manifest(root)
    index = read_expert_index(root, manifest)
    if not index:
        raise ManifestInvalid(MANIFEST_NAME, "the store has no experts")
    component = manifest.components[0]
    records = {key: record for key, record in index.items() if key.component == component.name}
    layers = _experts_by_layer(records)
    backbone = _backbone_bytes(component)
    per_token = _per_token(component, max(layers.values()))
    one = next(iter(records.values()))
    return StoreSummary(
        store=str(root),
        hash=store_hash(root),
        family=manifest.family,
        kind=manifest.kind,
        dtype=one.dtype,
        num_layers=int(component.config["num_hidden_layers"]),
        num_moe_layers=len(layers),
        experts_per_layer=max(layers.values()),
        experts_per_token=per_token,
        num_experts=len(records),
        expert_bytes=one.nbytes,
        totals=_totals(layers, per_token, one.nbytes, sum(backbone.values())),
        bytes_by_component=backbone | {"experts": sum(record.nbytes for record in records.values())},
        memory_table=_memory_table(backbone, layers, per_token, one.nbytes),
    )


def _experts_by_layer(records: Mapping[ExpertKey, ExpertRecord]) -> dict[int, int]:
    layers: dict[int, int] = {}
    for key in records:
        layers[key.layer] = layers.get(key.layer, 0) + 1
    return layers


def _per_token(component: Component, experts: int) -> int:
    value = component.config.get("num_experts_per_tok")
    if not isinstance(value, int) or not 1 <= value <= experts:
        raise ManifestInvalid(MANIFEST_NAME, f"num_experts_per_tok: {value!r} is not from 1 to {experts}")
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
    return "attention" if ".self_attn." in name else "dense"


def _totals(
    layers: Mapping[int, int], per_token: int, expert_bytes: int, backbone_bytes: int
) -> tuple[ResidencyTotal, ...]:
    """At half, one and two times the experts per token, and with all of them; least memory first."""
    experts = max(layers.values())
    whole = backbone_bytes + sum(layers.values()) * expert_bytes
    half, double = max(1, per_token // 2), min(experts, 2 * per_token)
    states = {
        half: f"WAKE (k={half}, reduced)",
        double: f"CRISIS (k={double})",
        per_token: f"FOCUS (k={per_token}, native)",
    }
    rows = []
    for kept, state in [*sorted(states.items()), (experts, "all experts")]:
        resident = sum(min(kept, count) for count in layers.values()) * expert_bytes
        total = backbone_bytes + resident
        rows.append(ResidencyTotal(state, kept, resident, total, 1 - total / whole))
    return tuple(rows)


def _memory_table(
    backbone: Mapping[str, int], layers: Mapping[int, int], per_token: int, expert_bytes: int
) -> tuple[MemoryRow, ...]:
    """The whole process first, then its parts, then one layer's experts alone."""
    everything = sum(layers.values()) * expert_bytes
    selective = sum(min(per_token, count) for count in layers.values()) * expert_bytes
    fixed = sum(backbone.values())
    first = min(layers)
    rows = [("whole process", fixed + everything, fixed + selective)]
    rows += [(kind, nbytes, nbytes) for kind, nbytes in backbone.items() if nbytes]
    rows.append((f"experts, {len(layers)} layers", everything, selective))
    one_layer = layers[first] * expert_bytes, min(per_token, layers[first]) * expert_bytes
    rows.append((f"of which layer {first}", *one_layer))
    return tuple(MemoryRow(name, all_of_it, kept, 1 - kept / all_of_it) for name, all_of_it, kept in rows)
