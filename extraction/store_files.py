"""Which files a copied store has, and where every byte of the checkpoint goes. Pure; called by `extraction.extract`.

Owns the layout that docs/store-format.md gives weight files: aligned expert records, padding tensors, header order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from extraction.manifest import (
    ITEM_SIZES,
    ROLES,
    SCALE_ROLES,
    SCALE_SUFFIX,
    Component,
    Dtype,
    ExpertKey,
    ExpertRecord,
    RecordPart,
    TensorEntry,
)
from extraction.plan import ExpertParts, ExtractionPlan, PlannedComponent, SourceTensor
from extraction.quantise import Quantization
from extraction.quantised_parts import EMBEDDING, HEAD, NOT_QUANTISED, QuantisedParts
from extraction.safetensors_file import ALIGNMENT, CODES, write_header

HeaderRow = tuple[str, str, tuple[int, ...], int]
"""Name, safetensors dtype, shape and bytes of a tensor."""


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
    """Of its values in the store; of a quantised piece that of the source."""
    shape: tuple[int, ...]
    quantization: Quantization | None = None
    scales_offset: int = 0
    """Where the scales of a quantised piece go, behind all codes of its owner."""

    @property
    def nbytes(self) -> int:
        """Of its values or codes, without scales."""
        if self.quantization is not None:
            return self.quantization.code_bytes(self.shape)
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def scales_nbytes(self) -> int:
        return 0 if self.quantization is None else self.quantization.scale_bytes(self.shape)


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


def lay_out(
    plan: ExtractionPlan, dtype: Dtype | None, quantised: QuantisedParts = NOT_QUANTISED
) -> StoreFiles:
    """dtype: of all weights in the store that are not quantised; None leaves each as it is.

    quantised: parts that are then made from the values of the checkpoint, not of `dtype`.
    """
    files: dict[str, StoreFile] = {}
    owners: dict[str, tuple[Piece, ...]] = {}
    for component in plan.components:
        if component.backbone:
            _lay_out_backbone(component, dtype, quantised, files, owners)
    for (name, layer), experts in _by_layer(plan.experts).items():
        file = f"experts/{name}-layer-{layer:04d}.safetensors"
        if quantised.experts is None:
            _lay_out_layer(file, experts, dtype, files, owners)
        else:
            _lay_out_quantised_layer(file, experts, quantised.experts, files, owners)
    return StoreFiles(files, owners)


def stored_tensors(
    component: PlannedComponent, quantised: QuantisedParts
) -> dict[str, tuple[SourceTensor, Quantization | None]]:
    """What a store keeps of a component's backbone, by canonical name, sorted.

    A head that is the embedding becomes a tensor of its own where it is quantised: the embedding never is.
    """
    if not component.has_linears:
        return {name: (tensor, None) for name, tensor in component.backbone.items()}
    tensors = dict(component.backbone)
    if quantised.head is not None and HEAD not in tensors and EMBEDDING in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    return {
        # Shapes of what is carried are as they are; who computes with one that is no matrix refuses it.
        name: (tensor, quantised.of_tensor(name) if _is_matrix(tensor.shape) else None)
        for name, tensor in sorted(tensors.items())
    }


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and min(shape) > 0


def describe(
    plan: ExtractionPlan,
    layout: StoreFiles,
    digests: Mapping[str, str],
    quantised: QuantisedParts = NOT_QUANTISED,
) -> tuple[tuple[Component, ...], list[ExpertRecord]]:
    """What manifest and index say of the copied weights. digests: of every owner. quantised: as in `lay_out`."""
    components = []
    for part in plan.components:
        entries = []
        for name in stored_tensors(part, quantised):
            owner = tensor_owner(part.name, name)
            (piece,) = layout.owners[owner]
            entries.append(_entry(name, piece, digests[owner]))
        components.append(Component(name=part.name, config=dict(part.config), tensors=tuple(entries)))
    records = []
    for key in plan.experts:
        owner = expert_owner(key)
        records.append(_record(key, layout.owners[owner], digests[owner]))
    return tuple(components), records


def _record(key: ExpertKey, pieces: tuple[Piece, ...], digest: str) -> ExpertRecord:
    parts = [
        RecordPart(role, piece.file, piece.offset, piece.nbytes)
        for role, piece in zip(ROLES, pieces, strict=True)
    ]
    quantization = pieces[0].quantization
    if quantization is None:
        return ExpertRecord(key, pieces[0].dtype, digest, tuple(parts))
    parts += [
        RecordPart(role, piece.file, piece.scales_offset, piece.scales_nbytes)
        for role, piece in zip(SCALE_ROLES, pieces, strict=True)
    ]
    return ExpertRecord(key, quantization.scheme, digest, tuple(parts))


def expert_owner(key: ExpertKey) -> str:
    return f"{key.component} {key.layer} {key.expert}"


def tensor_owner(component: str, name: str) -> str:
    return f"{component} {name}"


def _entry(name: str, piece: Piece, digest: str) -> TensorEntry:
    return TensorEntry(
        name=name,
        source=piece.tensor,
        file=piece.file,
        dtype=piece.dtype if piece.quantization is None else piece.quantization.scheme,
        shape=piece.shape,
        offset=piece.offset,
        nbytes=piece.nbytes + piece.scales_nbytes,
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
    quantised: QuantisedParts,
    files: dict[str, StoreFile],
    owners: dict[str, tuple[Piece, ...]],
) -> None:
    """Tensors back to back, in the order of their names; the scales of a quantised one follow its codes."""
    file = f"backbone/{component.name}.safetensors"
    rows: list[HeaderRow] = []
    placed: list[Piece] = []
    position = 0
    for name, (tensor, quantization) in stored_tensors(component, quantised).items():
        piece = _piece(tensor_owner(component.name, name), tensor, file, position, dtype or tensor.dtype)
        if quantization is None:
            rows.append(_header_row(name, tensor, piece.dtype))
        else:
            piece = replace(piece, dtype=tensor.dtype, quantization=quantization)
            piece = replace(piece, scales_offset=position + piece.nbytes)
            rows += [
                _codes_row(name, tensor.shape, quantization),
                _scales_row(name + SCALE_SUFFIX, tensor.shape, quantization),
            ]
        placed.append(piece)
        position += piece.nbytes + piece.scales_nbytes
    header = write_header(rows)
    start = len(header)
    for piece in placed:
        scales_offset = piece.scales_offset + start if piece.quantization is not None else 0
        owners[piece.owner] = (replace(piece, offset=piece.offset + start, scales_offset=scales_offset),)
    files[file] = StoreFile(file, header, start + position)


def _lay_out_layer(
    file: str,
    experts: Mapping[ExpertKey, ExpertParts],
    dtype: Dtype | None,
    files: dict[str, StoreFile],
    owners: dict[str, tuple[Piece, ...]],
) -> None:
    """Records of gate, up and down back to back."""
    rows = {
        key: [
            _header_row(_expert_name(key, role), part, dtype or part.dtype)
            for role, part in zip(ROLES, parts, strict=True)
        ]
        for key, parts in experts.items()
    }
    files[file], starts = _align(file, rows)
    for key, parts in experts.items():
        owner, offset = expert_owner(key), starts[key]
        pieces = []
        for part in parts:
            pieces.append(_piece(owner, part, file, offset, dtype or part.dtype))
            offset += pieces[-1].nbytes
        owners[owner] = tuple(pieces)


def _lay_out_quantised_layer(
    file: str,
    experts: Mapping[ExpertKey, ExpertParts],
    quantization: Quantization,
    files: dict[str, StoreFile],
    owners: dict[str, tuple[Piece, ...]],
) -> None:
    """Records of the codes of gate, up and down, then their scales, all back to back."""
    rows = {}
    for key, parts in experts.items():
        named = list(zip(ROLES, SCALE_ROLES, (part.shape for part in parts), strict=True))
        codes = [_codes_row(_expert_name(key, role), shape, quantization) for role, _, shape in named]
        scales = [_scales_row(_expert_name(key, role), shape, quantization) for _, role, shape in named]
        rows[key] = codes + scales
    files[file], starts = _align(file, rows)
    for key, parts in experts.items():
        owner, offset = expert_owner(key), starts[key]
        scales_offset = offset + sum(quantization.code_bytes(part.shape) for part in parts)
        pieces = []
        for part in parts:
            piece = replace(
                _piece(owner, part, file, offset, part.dtype),
                quantization=quantization,
                scales_offset=scales_offset,
            )
            pieces.append(piece)
            offset, scales_offset = offset + piece.nbytes, scales_offset + piece.scales_nbytes
        owners[owner] = tuple(pieces)


def _expert_name(key: ExpertKey, role: str) -> str:
    return f"layers.{key.layer}.experts.{key.expert}.{role}"


def _align(file: str, records: Mapping[ExpertKey, list[HeaderRow]]) -> tuple[StoreFile, dict[ExpertKey, int]]:
    """The file of these records, each aligned by an explicit padding tensor, and where in it each one starts."""
    rows: list[HeaderRow] = []
    starts, position = {}, 0
    for key, record in records.items():
        gap = -position % ALIGNMENT
        if gap:
            rows.append((f"padding.{key.expert}", "U8", (gap,), gap))
        starts[key] = position + gap
        rows += record
        position += gap + sum(row[3] for row in record)
    header = write_header(rows)
    placed = {key: len(header) + start for key, start in starts.items()}
    return StoreFile(file, header, len(header) + position), placed


def _header_row(name: str, tensor: SourceTensor, dtype: Dtype) -> HeaderRow:
    return name, CODES[dtype], tensor.shape, math.prod(tensor.shape) * ITEM_SIZES[dtype]


def _codes_row(name: str, shape: tuple[int, ...], quantization: Quantization) -> HeaderRow:
    code = "I8" if quantization.scheme == "int8" else "U8"
    return name, code, quantization.code_shape(shape), quantization.code_bytes(shape)


def _scales_row(name: str, shape: tuple[int, ...], quantization: Quantization) -> HeaderRow:
    return name, "BF16", quantization.scale_shape(shape), quantization.scale_bytes(shape)


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
