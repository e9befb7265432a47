"""Which files a copied store has, and where every byte of the checkpoint goes. Pure; called by `extraction.extract`.

Owns the layout that docs/store-format.md gives weight files: aligned expert records, padding tensors, header order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from extraction.manifest import (
    ITEM_SIZES,
    ROLES,
    Component,
    Dtype,
    ExpertKey,
    ExpertRecord,
    RecordPart,
    TensorEntry,
)
from extraction.plan import ExpertParts, ExtractionPlan, PlannedComponent, SourceTensor
from extraction.safetensors_file import ALIGNMENT, CODES, write_header


@dataclass(frozen=True)
class StoreFile:
    """A weight file: its header, and how long it is with all that follows."""

    name: str
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """A tensor, or a slice of a stacked one, on its way from a shard to its place in a store file."""

    owner: str
    """What is hashed together: an expert's gate, up and down, or one backbone tensor; as in `first-load-hashes.txt`."""
    tensor: str
    """Published name."""
    shard: str
    source_offset: int
    source_bytes: int
    source_dtype: Dtype
    file: str
    offset: int
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Step:
    """All that one shard gives to one file; done or not done."""

    shard: str
    file: str
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Unique among the steps of a store."""
        return f"{self.shard} -> {self.file}"


@dataclass(frozen=True)
class StoreFiles:
    """All weight files of a store."""

    files: Mapping[str, StoreFile]
    owners: Mapping[str, tuple[Piece, ...]]
    """An expert's pieces in the order gate, up, down; a backbone tensor's one piece."""

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """By shard, and by file within a shard: each shard is read once and front to back, if it was written so."""
        groups: dict[tuple[str, str], list[Piece]] = {}
        for pieces in self.owners.values():
            for piece in pieces:
                groups.setdefault((piece.shard, piece.file), []).append(piece)
        return tuple(Step(shard, file, tuple(groups[shard, file])) for shard, file in sorted(groups))

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(sorted({piece.shard for pieces in self.owners.values() for piece in pieces}))


def lay_out(plan: ExtractionPlan, dtype: Dtype | None) -> StoreFiles:
    """dtype: of all weights in the store; None leaves each as it is."""
    files: dict[str, StoreFile] = {}
    owners: dict[str, tuple[Piece, ...]] = {}
    for component in plan.components:
        if component.backbone:
            _lay_out_backbone(component, dtype, files, owners)
    for (name, layer), experts in _by_layer(plan.experts).items():
        file = f"experts/{name}-layer-{layer:04d}.safetensors"
        _lay_out_layer(file, experts, dtype, files, owners)
    return StoreFiles(files, owners)


def describe(
    plan: ExtractionPlan, layout: StoreFiles, digests: Mapping[str, str]
) -> tuple[tuple[Component, ...], list[ExpertRecord]]:
    """What manifest and index say of the copied weights. digests: of every owner."""
    components = []
    for part in plan.components:
        entries = []
        for name in part.backbone:
            owner = tensor_owner(part.name, name)
            (piece,) = layout.owners[owner]
            entries.append(_entry(name, piece, digests[owner]))
        components.append(Component(name=part.name, config=dict(part.config), tensors=tuple(entries)))
    records = []
    for key in plan.experts:
        owner = expert_owner(key)
        gate, up, down = (
            RecordPart(role, piece.file, piece.offset, piece.nbytes)
            for role, piece in zip(ROLES, layout.owners[owner], strict=True)
        )
        dtype = layout.owners[owner][0].dtype
        records.append(ExpertRecord(key, dtype, digests[owner], (gate, up, down)))
    return tuple(components), records


def expert_owner(key: ExpertKey) -> str:
    return f"{key.component} {key.layer} {key.expert}"


def tensor_owner(component: str, name: str) -> str:
    return f"{component} {name}"


def _entry(name: str, piece: Piece, digest: str) -> TensorEntry:
    return TensorEntry(
        name=name,
        source=piece.tensor,
        file=piece.file,
        dtype=piece.dtype,
        shape=piece.shape,
        offset=piece.offset,
        nbytes=piece.nbytes,
        sha256=digest,
    )


def _by_layer(
    experts: Mapping[ExpertKey, ExpertParts],
) -> dict[tuple[str, int], dict[ExpertKey, ExpertParts]]:
    layers: dict[tuple[str, int], dict[ExpertKey, ExpertParts]] = {}
    for key, parts in experts.items():
        layers.setdefault((key.component, key.layer), {})[key] = parts
    return layers


def _lay_out_backbone(
    component: PlannedComponent,
    dtype: Dtype | None,
    files: dict[str, StoreFile],
    owners: dict[str, tuple[Piece, ...]],
) -> None:
    """Tensors back to back, in the order of their names."""
    file = f"backbone/{component.name}.safetensors"
    named = [(name, tensor, dtype or tensor.dtype) for name, tensor in component.backbone.items()]
    header = write_header([_header_row(name, tensor, kept) for name, tensor, kept in named])
    offset = len(header)
    for name, tensor, kept in named:
        owner = tensor_owner(component.name, name)
        piece = _piece(owner, tensor, file, offset, kept)
        owners[owner] = (piece,)
        offset += piece.nbytes
    files[file] = StoreFile(file, header, offset)


def _lay_out_layer(
    file: str,
    experts: Mapping[ExpertKey, ExpertParts],
    dtype: Dtype | None,
    files: dict[str, StoreFile],
    owners: dict[str, tuple[Piece, ...]],
) -> None:
    """Records of gate, up and down back to back, each record aligned by an explicit padding tensor."""
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    starts, position = [], 0
    for key, parts in experts.items():
        gap = -position % ALIGNMENT
        if gap:
            rows.append((f"padding.{key.expert}", "U8", (gap,), gap))
        starts.append(position + gap)
        for role, part in zip(ROLES, parts, strict=True):
            name = f"layers.{key.layer}.experts.{key.expert}.{role}"
            rows.append(_header_row(name, part, dtype or part.dtype))
        position += gap + sum(row[3] for row in rows[-3:])
    header = write_header(rows)
    for start, (key, parts) in zip(starts, experts.items(), strict=True):
        owner, offset = expert_owner(key), len(header) + start
        pieces = []
        for part in parts:
            pieces.append(_piece(owner, part, file, offset, dtype or part.dtype))
            offset += pieces[-1].nbytes
        owners[owner] = tuple(pieces)
    files[file] = StoreFile(file, header, len(header) + position)


def _header_row(name: str, tensor: SourceTensor, dtype: Dtype) -> tuple[str, str, tuple[int, ...], int]:
    return name, CODES[dtype], tensor.shape, math.prod(tensor.shape) * ITEM_SIZES[dtype]


def _piece(owner: str, tensor: SourceTensor, file: str, offset: int, dtype: Dtype) -> Piece:
    return Piece(
        owner,
        tensor.name,
        tensor.file,
        tensor.offset,
        tensor.nbytes,
        tensor.dtype,
        file,
        offset,
        dtype,
        tensor.shape,
    )


def source_bytes(pieces: Iterable[Piece]) -> int:
    return sum(piece.source_bytes for piece in pieces)
