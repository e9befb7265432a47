"""Turns a checkpoint into an expert store: `sage-moe extract`.

Copies shard bytes through one small buffer; never holds a tensor. The store is written under a temporary name
beside its destination, synced, and renamed at the end, so that a final name always means a whole store.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from extraction.atomic_folder import atomic_folder, check_vacant
from extraction.errors import CheckpointDamaged, PathRefused
from extraction.files import open_inside
from extraction.manifest import (
    FORMAT_VERSION,
    INDEX_NAME,
    ROLES,
    Component,
    ExpertKey,
    ExpertRecord,
    FileEntry,
    Manifest,
    RecordPart,
    TensorEntry,
    write_expert_index,
    write_manifest,
)
from extraction.plan import ExpertParts, ExtractionPlan, PlannedComponent, SourceTensor, plan_extraction
from extraction.safetensors_file import ALIGNMENT, write_header

COPY_BUFFER_BYTES = 8 * 1024 * 1024
MAX_OPEN_SHARDS = 64
BYTES_PER_ROW = 512
"""Most that a tensor takes in a header, or an expert in the index."""
BYTES_PER_TENSOR = 2048
"""Most that a backbone tensor takes in the manifest."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class ExtractionReport:
    """What was written."""

    root: Path
    kind: str
    num_layers: int
    num_experts: int
    weight_bytes: int


def extract(
    source: Path, dest: Path, *, index_only: bool = False, progress: Progress | None = None
) -> ExtractionReport:
    """Write the store of the checkpoint `source` to `dest`, which must not exist.

    index_only copies no weights: the store then points into the original shards, which must stay where they are.
    Raises an ExtractionError; whatever is raised, nothing is left behind.
    """
    check_vacant(dest)
    plan = plan_extraction(source)
    if index_only:
        _check_nameable(source)
    kind: Literal["copied", "indexed"] = "indexed" if index_only else "copied"
    with atomic_folder(dest, space_needed(plan, kind)) as root:
        if index_only:
            components, records = _index_in_place(plan)
        else:
            components, records = _copy_weights(plan, root, _Meter(plan.weight_bytes, progress))
        _write_descriptions(plan, root, components, records, kind)
    layers = {(key.component, key.layer) for key in plan.experts}
    return ExtractionReport(dest, kind, len(layers), len(plan.experts), plan.weight_bytes)


def _check_nameable(source: Path) -> None:
    """The manifest of an index holds the folder's name, as JSON text."""
    try:
        str(source.resolve()).encode()
    except UnicodeEncodeError as error:
        raise PathRefused(str(source), "cannot be indexed: its name is no UTF-8") from error


def space_needed(plan: ExtractionPlan, kind: Literal["copied", "indexed"]) -> int:
    """Bytes of disk that the store takes at most, all files rounded up to whole blocks."""
    small = sum(map(len, plan.small_files.values()))
    # The manifest holds the configuration twice, indented.
    described = 8 * len(plan.small_files["config.json"]) + BYTES_PER_TENSOR * plan.num_backbone_tensors
    indexed = small + described + BYTES_PER_ROW * len(plan.experts)
    num_files = len(plan.small_files) + len(plan.components) + 8
    if kind == "indexed":
        return indexed + ALIGNMENT * num_files
    num_files += len({(key.component, key.layer) for key in plan.experts}) * 2
    padding = sum(-sum(part.nbytes for part in parts) % ALIGNMENT for parts in plan.experts.values())
    headers = BYTES_PER_ROW * (4 * len(plan.experts) + plan.num_backbone_tensors)
    return indexed + plan.weight_bytes + padding + headers + ALIGNMENT * num_files


@dataclass
class _Meter:
    """Counts copied bytes for whoever watches."""

    total_bytes: int
    progress: Progress | None
    done_bytes: int = 0

    def add(self, nbytes: int) -> None:
        self.done_bytes += nbytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.total_bytes)


@dataclass
class _Shards:
    """Open descriptors of the source's shards."""

    source: Path
    _open: dict[str, int] = field(default_factory=dict)

    def chunks(self, tensor: SourceTensor) -> Iterator[bytes]:
        """The tensor's bytes, at most COPY_BUFFER_BYTES at a time."""
        descriptor = self._descriptor(tensor.file)
        position, end = tensor.offset, tensor.offset + tensor.nbytes
        while position < end:
            try:
                chunk = os.pread(descriptor, min(COPY_BUFFER_BYTES, end - position), position)
            except OSError as error:
                reason = f"cannot be read at offset {position}: {error.strerror}"
                raise CheckpointDamaged(tensor.file, reason) from error
            if not chunk:
                raise CheckpointDamaged(tensor.file, f"is cut short inside tensor {tensor.name!r}")
            position += len(chunk)
            yield chunk

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                self.close()
            self._open[file] = open_inside(self.source, file)
        return self._open[file]


def _copy_weights(
    plan: ExtractionPlan, root: Path, meter: _Meter
) -> tuple[tuple[Component, ...], list[ExpertRecord]]:
    shards = _Shards(plan.source)
    try:
        components = tuple(_write_backbone(part, root, shards, meter) for part in plan.components)
        records = []
        for (component, layer), experts in _by_layer(plan).items():
            file = f"experts/{component}-layer-{layer:04d}.safetensors"
            records += _write_layer(file, experts, root, shards, meter)
    finally:
        shards.close()
    return components, records


def _by_layer(plan: ExtractionPlan) -> dict[tuple[str, int], dict[ExpertKey, ExpertParts]]:
    layers: dict[tuple[str, int], dict[ExpertKey, ExpertParts]] = {}
    for key, parts in plan.experts.items():
        layers.setdefault((key.component, key.layer), {})[key] = parts
    return layers


def _write_backbone(part: PlannedComponent, root: Path, shards: _Shards, meter: _Meter) -> Component:
    file = f"backbone/{part.name}.safetensors"
    header = write_header([(name, t.header.code, t.shape, t.nbytes) for name, t in part.backbone.items()])
    entries, offset = [], len(header)
    with _create(root / file) as out:
        out.write(header)
        for name, tensor in part.backbone.items():
            digest = _copy(out, [tensor], shards, meter)
            entries.append(_tensor_entry(name, tensor, file, offset, digest))
            offset += tensor.nbytes
    return _component(part, entries)


def _write_layer(
    file: str, experts: Mapping[ExpertKey, ExpertParts], root: Path, shards: _Shards, meter: _Meter
) -> list[ExpertRecord]:
    """One file: records of gate, up and down back to back, each record aligned by an explicit padding tensor."""
    table: list[tuple[str, str, tuple[int, ...], int]] = []
    gaps, position = [], 0
    for key, parts in experts.items():
        gaps.append(-position % ALIGNMENT)
        if gaps[-1]:
            table.append((f"padding.{key.expert}", "U8", (gaps[-1],), gaps[-1]))
        for role, part in zip(ROLES, parts, strict=True):
            name = f"layers.{key.layer}.experts.{key.expert}.{role}"
            table.append((name, part.header.code, part.shape, part.nbytes))
        position += gaps[-1] + sum(part.nbytes for part in parts)
    header = write_header(table)
    records, offset = [], len(header)
    with _create(root / file) as out:
        out.write(header)
        for gap, (key, parts) in zip(gaps, experts.items(), strict=True):
            out.write(bytes(gap))
            offset += gap
            digest = _copy(out, parts, shards, meter)
            records.append(_record(key, parts, [file] * 3, _ends(offset, parts), digest))
            offset += sum(part.nbytes for part in parts)
    return records


def _ends(offset: int, parts: ExpertParts) -> list[int]:
    """Offsets of parts that lie back to back from `offset` on."""
    offsets = []
    for part in parts:
        offsets.append(offset)
        offset += part.nbytes
    return offsets


def _index_in_place(plan: ExtractionPlan) -> tuple[tuple[Component, ...], list[ExpertRecord]]:
    records = [
        _record(key, parts, [part.file for part in parts], [part.offset for part in parts], None)
        for key, parts in plan.experts.items()
    ]
    components = tuple(
        _component(
            part, [_tensor_entry(name, t, t.file, t.offset, None) for name, t in part.backbone.items()]
        )
        for part in plan.components
    )
    return components, records


def _component(part: PlannedComponent, tensors: list[TensorEntry]) -> Component:
    return Component(name=part.name, config=dict(part.config), tensors=tuple(tensors))


def _record(
    key: ExpertKey, parts: ExpertParts, files: list[str], offsets: list[int], digest: str | None
) -> ExpertRecord:
    gate, up, down = (
        RecordPart(role, file, offset, part.nbytes)
        for role, part, file, offset in zip(ROLES, parts, files, offsets, strict=True)
    )
    return ExpertRecord(key, parts[0].dtype, digest, (gate, up, down))


def _tensor_entry(name: str, tensor: SourceTensor, file: str, offset: int, digest: str | None) -> TensorEntry:
    return TensorEntry(
        name=name,
        source=tensor.name,
        file=file,
        dtype=tensor.dtype,
        shape=tensor.shape,
        offset=offset,
        nbytes=tensor.nbytes,
        sha256=digest,
    )


def _write_descriptions(
    plan: ExtractionPlan,
    root: Path,
    components: tuple[Component, ...],
    records: list[ExpertRecord],
    kind: Literal["copied", "indexed"],
) -> None:
    files = {}
    for name, content in plan.small_files.items():
        (root / name).write_bytes(content)
        files[name] = FileEntry(nbytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    files[INDEX_NAME] = write_expert_index(root, records)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        family=plan.family,
        kind=kind,
        source_root=str(plan.source.resolve()) if kind == "indexed" else None,
        config=plan.config,
        generation_config=plan.generation_config,
        components=components,
        files=files,
    )
    write_manifest(root, manifest)


def _copy(out: BinaryIO, parts: Sequence[SourceTensor], shards: _Shards, meter: _Meter) -> str:
    """Append the parts' bytes; their SHA-256 in hex."""
    digest = hashlib.sha256()
    for part in parts:
        for chunk in shards.chunks(part):
            out.write(chunk)
            digest.update(chunk)
            meter.add(len(chunk))
    return digest.hexdigest()


def _create(path: Path) -> BinaryIO:
    path.parent.mkdir(exist_ok=True)
    return open(path, "xb", buffering=1 << 20)
