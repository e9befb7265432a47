"""What an extraction will do, decided and checked before a byte is copied.

Reads the configuration and the headers of all shards, places every tensor by the family's layout, and refuses what
is missing, doubled or of another shape. An expert's three projections may lie in different shards.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extraction.component_layout import BackboneTensor, ExpertTensor, TensorSlice
from extraction.errors import CheckpointDamaged, PathRefused, TensorsMissing, TensorUnexpected
from extraction.files import open_inside, read_small_file
from extraction.layouts import Layout, layout_for
from extraction.manifest import ITEM_SIZES, ROLES, Dtype, ExpertKey, check_relative
from extraction.safetensors_file import DTYPES, TensorHeader, read_header
from extraction.strict_json import parse_object
from extraction.tokenizer_file import TOKENIZER_FILE, built_tokenizer

SHARD_INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
MAX_SMALL_FILE_BYTES = 64 * 1024 * 1024
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)
MAX_NAMES_SHOWN = 5

Place = ExpertTensor | BackboneTensor


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint, or a slice of a stacked one, and the shard that holds it."""

    file: str
    header: TensorHeader
    """Of the published tensor, whole."""
    slice: TensorSlice | None = None
    """The part of it that is meant; None means all of it."""

    @property
    def name(self) -> str:
        """Published name; several slices share one."""
        return self.header.name

    @property
    def dtype(self) -> Dtype:
        return DTYPES[self.header.code]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape if self.slice is None else self.slice.shape

    @property
    def offset(self) -> int:
        """Of the first byte, from the start of the file."""
        if self.slice is None:
            return self.header.offset
        return self.header.offset + self.slice.first_element * ITEM_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        if self.slice is None:
            return self.header.nbytes
        return math.prod(self.slice.shape) * ITEM_SIZES[self.dtype]


ExpertParts = tuple[SourceTensor, SourceTensor, SourceTensor]
"""Gate, up and down of one expert."""


@dataclass(frozen=True)
class PlannedComponent:
    """One component's configuration and backbone."""

    name: str
    config: Mapping[str, Any]
    backbone: Mapping[str, SourceTensor]
    """By canonical name, sorted."""
    has_linears: bool = True
    """Which can be quantised; False where tensors are carried as they are."""


@dataclass(frozen=True)
class ExtractionPlan:
    """All that a store will hold, and where it comes from."""

    source: Path
    family: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    components: tuple[PlannedComponent, ...]
    """The decoder that the store serves comes first."""
    experts: Mapping[ExpertKey, ExpertParts]
    """Sorted by key, those of all components."""
    small_files: Mapping[str, bytes]

    @property
    def num_backbone_tensors(self) -> int:
        return sum(len(component.backbone) for component in self.components)

    @property
    def weight_bytes(self) -> int:
        experts = sum(part.nbytes for parts in self.experts.values() for part in parts)
        return experts + sum(t.nbytes for component in self.components for t in component.backbone.values())


def plan_extraction(source: Path) -> ExtractionPlan:
    """Raises CheckpointDamaged, TensorsMissing, TensorUnexpected, FamilyUnknown, ConfigInvalid or PathRefused."""
    if not os.path.isdir(source):
        raise CheckpointDamaged(str(source), "is no checkpoint folder")
    if not os.access(source, os.R_OK | os.X_OK):
        raise PathRefused(str(source), os.strerror(errno.EACCES))
    small_files = _read_small_files(source)
    config = _read_json(small_files, "config.json", required=True)
    layout = layout_for(config)
    tokenizer = built_tokenizer(small_files, layout.family)
    if tokenizer is not None:
        small_files[TOKENIZER_FILE] = tokenizer
    placed = _place(layout, _read_shards(source))
    _check_complete(layout, placed)
    return ExtractionPlan(
        source,
        layout.family,
        config,
        _read_json(small_files, "generation_config.json", required=False),
        _components(layout, placed),
        {key: _expert(placed, key) for key in sorted(layout.experts)},
        small_files,
    )


def _read_small_files(source: Path) -> dict[str, bytes]:
    present = [name for name in SMALL_FILES if os.path.lexists(source / name)]
    files = {name: read_small_file(source, name, MAX_SMALL_FILE_BYTES) for name in present}
    for name, content in files.items():
        if name.endswith(".json"):
            # Serving would fail on it, long after the checkpoint is gone.
            parse_object(content, name)
    return files


def _read_json(files: Mapping[str, bytes], name: str, required: bool) -> dict[str, Any]:
    if name not in files:
        if required:
            raise CheckpointDamaged(name, "is missing")
        return {}
    return parse_object(files[name], name)


def _read_shards(source: Path) -> dict[str, SourceTensor]:
    """Headers of all shards by published name. Every name that the shard index promises is there."""
    promised = read_shard_index(source)
    files = sorted(set(promised.values())) if promised else [SINGLE_SHARD]
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        for name, header in _read_shard(source, file).items():
            if name in tensors:
                raise CheckpointDamaged(file, f"tensor {name[:200]!r} is also in {tensors[name].file}")
            tensors[name] = SourceTensor(file, header)
    absent = sorted(
        name for name, file in promised.items() if name not in tensors or tensors[name].file != file
    )
    if absent:
        raise TensorsMissing(tuple(absent[:MAX_NAMES_SHOWN]), len(absent))
    return tensors


def read_shard_index(source: Path) -> dict[str, str]:
    """Tensor name -> shard; empty where the checkpoint is one file. Raises CheckpointDamaged or PathRefused."""
    if not os.path.lexists(source / SHARD_INDEX):
        return {}
    table = parse_object(
        read_small_file(source, SHARD_INDEX, MAX_SMALL_FILE_BYTES), SHARD_INDEX, has_unique_keys=True
    )
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointDamaged(SHARD_INDEX, "has no weight_map from names to files")
    for file in set(weight_map.values()):
        try:
            check_relative(file)
        except ValueError as error:
            raise PathRefused(SHARD_INDEX, str(error)) from error
    return weight_map


def _read_shard(source: Path, file: str) -> dict[str, TensorHeader]:
    descriptor = open_inside(source, file)
    try:
        return read_header(descriptor, file)
    finally:
        os.close(descriptor)


def _place(layout: Layout, tensors: Mapping[str, SourceTensor]) -> dict[Place, SourceTensor]:
    placed: dict[Place, SourceTensor] = {}
    for name, tensor in tensors.items():
        if layout.is_ignored(name):
            continue
        placements = layout.place(name, tensor.header.shape)
        if tensor.header.code not in DTYPES:
            raise TensorUnexpected(name, f"has dtype {tensor.header.code}; supported: {', '.join(DTYPES)}")
        for placement in placements:
            if placement.place in placed:
                raise TensorUnexpected(name, f"means the same as {placed[placement.place].name}")
            placed[placement.place] = replace(tensor, slice=placement.slice)
    return placed


def _check_complete(layout: Layout, placed: Mapping[Place, SourceTensor]) -> None:
    """Raises TensorsMissing. A component without any tensor is named as a whole."""
    present = {place.component for place in placed if isinstance(place, BackboneTensor)}
    absent = {part.name: f"{part.prefixes[0]}*" for part in layout.components if part.name not in present}
    missing = [
        layout.reported_name(tensor)
        for tensor in layout.expected() - placed.keys()
        if isinstance(tensor, ExpertTensor) or tensor.component not in absent
    ]
    missing += absent.values()
    if missing:
        raise TensorsMissing(tuple(sorted(missing)[:MAX_NAMES_SHOWN]), len(missing))


def _components(layout: Layout, placed: Mapping[Place, SourceTensor]) -> tuple[PlannedComponent, ...]:
    backbones: dict[str, dict[str, SourceTensor]] = {part.name: {} for part in layout.components}
    for place, tensor in placed.items():
        if isinstance(place, BackboneTensor):
            backbones[place.component][place.name] = tensor
    return tuple(
        PlannedComponent(
            part.name,
            part.config,
            dict(sorted(backbones[part.name].items())),
            part.decoder is not None or part.is_dense_decoder,
        )
        for part in layout.components
    )


def _expert(placed: Mapping[Place, SourceTensor], key: ExpertKey) -> ExpertParts:
    gate, up, down = (placed[ExpertTensor(key, role)] for role in ROLES)
    if not gate.dtype == up.dtype == down.dtype:
        raise TensorUnexpected(
            up.name, f"an expert's projections differ in dtype: {gate.dtype}, {up.dtype}, {down.dtype}"
        )
    return gate, up, down
