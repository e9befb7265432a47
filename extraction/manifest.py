"""The expert store's own description: `manifest.json`, and what an expert and its record are.

Owns the manifest's format (docs/store-format.md), reading and writing; `extraction.expert_index` has the index of
experts. Nothing in it is trusted before it was checked: schema, version, ranges, and that every path stays inside its
folder. Read by `experts.store`.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from extraction.errors import ManifestInvalid
from extraction.files import read_small_file
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts

FORMAT_VERSION: Literal[1] = 1
QUANTISED_VERSION: Literal[2] = 2
"""Of stores of which the experts are quantised and nothing else."""
BACKBONE_VERSION: Literal[3] = 3
"""Of stores whose backbone or head is quantised. Each store bears the lowest version that can say what it holds, so
that programs which know only that one can read it."""
VERSIONS = (FORMAT_VERSION, QUANTISED_VERSION, BACKBONE_VERSION)
_FIELDS_SINCE = {"quantization": 2, "backbone_quantization": 3, "head_quantization": 3}
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
MAX_GROUPS = 4096
MAX_FILE_BYTES = 1 << 60
"""Of a file that offsets point into; keeps sums of offsets and sizes within 64 bits."""
ROLES = ("gate", "up", "down")
SCALE_ROLES = ("gate_scale", "up_scale", "down_scale")
"""Of quantised experts, behind the codes under the names of ROLES."""
SCALE_SUFFIX = "_scale"
"""Of a quantised backbone tensor's scales, in the header of their file."""
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}

Dtype = Literal["bfloat16", "float16", "float32"]
StoredDtype = Literal["bfloat16", "float16", "float32", "int8", "int4"]
"""Of a backbone tensor: a dtype, or the scheme of a quantised one."""
SHA256_PATTERN = "[0-9a-f]{64}"
NAME_PATTERN = "[A-Za-z0-9_.-]{1,256}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
MAX_PATH_CHARS = 1024
Sha256 = Annotated[str, Field(pattern=f"^{SHA256_PATTERN}$")]


class ExpertKey(NamedTuple):
    """One expert, everywhere: the thinker's and the talker's layer 3 are different experts."""

    component: str
    layer: int
    expert: int


def group_of(key: ExpertKey, num_groups: int) -> int:
    """Which of several groups an expert is dealt to: each layer's experts in turn, each layer beginning with another
    group, so that every layer's work is spread evenly. What actors hold and what partial stores hold."""
    return (key.expert + key.layer) % num_groups


@dataclass(frozen=True)
class RecordPart:
    """One projection's bytes. `offset` counts from the start of the file."""

    role: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExpertRecord:
    """Where one expert lies: gate, up and down, each [out, in] row-major; of a quantised one also its scales."""

    key: ExpertKey
    dtype: str
    """Or the scheme of a quantised one."""
    sha256: str | None
    """Of the parts' bytes in order; None in an index over original shards."""
    parts: tuple[RecordPart, ...]
    """In the order of ROLES, then of SCALE_ROLES where it is quantised."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def is_contiguous(self) -> bool:
        """Whether one read loads it."""
        return all(
            part.file == after.file and part.offset + part.nbytes == after.offset
            for part, after in pairwise(self.parts)
        )


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Model):
    """A backbone tensor under its canonical name, and where its bytes are."""

    name: Name
    source: str
    """Its name in the checkpoint."""
    file: str
    dtype: StoredDtype
    shape: tuple[Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)], ...] = Field(max_length=16)
    offset: int = Field(ge=0, le=MAX_FILE_BYTES)
    nbytes: int = Field(ge=0, le=MAX_FILE_BYTES)
    sha256: Sha256 | None
    """Of a quantised one over codes, then scales."""

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        return check_relative(value)

    @model_validator(mode="after")
    def _fills_its_shape(self) -> Self:
        if self.dtype in ITEM_SIZES:
            self.check_bytes(math.prod(self.shape) * ITEM_SIZES[self.dtype])
        return self

    def check_bytes(self, expected: int) -> None:
        """Raises ValueError."""
        if expected != self.nbytes:
            raise ValueError(f"tensor {self.name!r}: {self.nbytes} bytes do not hold {self.shape}")


class Component(_Model):
    """One part of the model: a decoder, mostly with experts of its own, or what is carried as it is."""

    name: Name
    config: dict[str, Any]
    tensors: tuple[TensorEntry, ...]


class FileEntry(_Model):
    """A file that the store holds whole."""

    nbytes: int = Field(ge=0)
    sha256: Sha256


class GroupShare(_Model):
    """Some of the groups that experts are dealt to by `group_of`."""

    total: int = Field(ge=2, le=MAX_GROUPS)
    kept: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=MAX_GROUPS)
    """Numbers from 0, sorted."""

    @model_validator(mode="after")
    def _keeps_some(self) -> Self:
        if list(self.kept) != sorted(set(self.kept)) or self.kept[-1] >= self.total:
            raise ValueError(f"keeps {list(self.kept)} of {self.total} groups")
        return self

    def holds(self, key: ExpertKey) -> bool:
        return group_of(key, self.total) in self.kept


class LeftOut(_Model):
    """What a partial store lacks of its checkpoint. Readers that run the model refuse such a store."""

    components: tuple[Name, ...]
    """Whole ones, sorted."""
    layers: dict[Name, tuple[Annotated[int, Field(ge=0)], ...]]
    """Of components that are there: the layers that are not, sorted; experts and backbone tensors."""
    groups: GroupShare | None = None
    """Of all layers that are there: whose experts are; None means all groups'. Backbone tensors belong to none."""

    @model_validator(mode="after")
    def _leaves_something_out(self) -> Self:
        if not self.components and not any(self.layers.values()) and self.groups is None:
            raise ValueError("leaves nothing out")
        return self


class Manifest(_Model):
    """What `manifest.json` holds."""

    format_version: Literal[1, 2, 3]
    family: str
    kind: Literal["copied", "indexed"]
    source_root: str | None
    """Absolute folder of the original shards; only in an index over them."""
    left_out: LeftOut | None
    """None in a store that holds the whole model."""
    quantization: Quantization | None = None
    """Of all experts; from version 2 on, in which it is always there."""
    backbone_quantization: Quantization | None = None
    """Of the decoders' linear layers; from version 3 on."""
    head_quantization: Quantization | None = None
    """Of the decoders' heads; from version 3 on."""
    config: dict[str, Any]
    generation_config: dict[str, Any]
    components: tuple[Component, ...]
    """The decoder that answers text comes first."""
    files: dict[str, FileEntry]

    @property
    def served(self) -> Component:
        """The decoder that answers text. Raises ManifestInvalid when the store has no component."""
        if not self.components:
            raise ManifestInvalid(MANIFEST_NAME, "the store has no experts: it lists no component")
        return self.components[0]

    @property
    def quantised(self) -> QuantisedParts:
        return QuantisedParts(self.quantization, self.backbone_quantization, self.head_quantization)

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in value:
            check_relative(name)
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.kind == "indexed") != (self.source_root is not None):
            raise ValueError("names no folder of original shards, or one that it does not use")
        if self.format_version != version_for(self.quantised):
            raise ValueError("says what is quantised in another version than the one for it")
        if self.quantised.name is not None and self.kind == "indexed":
            raise ValueError("is quantised and points to original shards")
        if self.source_root is not None and not PurePosixPath(self.source_root).is_absolute():
            raise ValueError(f"source_root {self.source_root[:200]!r} is no absolute path")
        if len({component.name for component in self.components}) != len(self.components):
            raise ValueError("names a component twice")
        for component in self.components:
            if len({tensor.name for tensor in component.tensors}) != len(component.tensors):
                raise ValueError(f"names a tensor of component {component.name!r} twice")
            if self.kind == "copied" and any(tensor.sha256 is None for tensor in component.tensors):
                raise ValueError("has a copied tensor without a hash")
            for tensor in component.tensors:
                if tensor.dtype not in ITEM_SIZES:
                    _check_quantised(tensor, self.quantised)
        return self


def version_for(quantised: QuantisedParts) -> Literal[1, 2, 3]:
    """The lowest version that can say so."""
    if quantised.backbone is not None or quantised.head is not None:
        return BACKBONE_VERSION
    return FORMAT_VERSION if quantised.experts is None else QUANTISED_VERSION


def _check_quantised(tensor: TensorEntry, quantised: QuantisedParts) -> None:
    """Raises ValueError."""
    quantization = quantised.of_tensor(tensor.name)
    if quantization is None or quantization.scheme != tensor.dtype or len(tensor.shape) != 2:
        raise ValueError(f"tensor {tensor.name!r} is {tensor.dtype}, which the store does not say of it")
    tensor.check_bytes(quantization.code_bytes(tensor.shape) + quantization.scale_bytes(tensor.shape))


def check_relative(path: str) -> str:
    """The path itself, if it is relative and stays inside. Raises ValueError."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leads out of its folder")
    if not path.isprintable() or len(path) > MAX_PATH_CHARS:
        raise ValueError(f"path {path!r} is too long or has control characters")
    return path


def read_manifest(root: Path) -> Manifest:
    """Raises ManifestInvalid, or PathRefused when it is no regular file."""
    return parse_manifest(read_small_file(root, MANIFEST_NAME, MAX_MANIFEST_BYTES))


def parse_manifest(raw: bytes) -> Manifest:
    """Raises ManifestInvalid."""
    try:
        version = json.loads(raw).get("format_version")
        if version not in VERSIONS:
            known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
            raise ManifestInvalid(MANIFEST_NAME, f"format version {version!r}; this program reads {known}")
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:200] for part in first["loc"])
        raise ManifestInvalid(MANIFEST_NAME, f"{where}: {first['msg']}".lstrip(": ")) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ManifestInvalid(MANIFEST_NAME, "is not a JSON object of a store") from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    # Fields that a version does not have are left out, for readers that know that version only.
    unknown = {name for name, since in _FIELDS_SINCE.items() if since > manifest.format_version}
    text = manifest.model_dump_json(indent=1, exclude=unknown)
    (root / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def store_hash(root: Path) -> str:
    """SHA-256 of the manifest, in hex: it names the store, since the manifest holds all other hashes."""
    return hashlib.sha256(read_small_file(root, MANIFEST_NAME, MAX_MANIFEST_BYTES)).hexdigest()


def check_files(root: Path, manifest: Manifest) -> None:
    """Raises ManifestInvalid when a file that the store holds whole is not the one that was written."""
    for name, entry in manifest.files.items():
        raw = read_small_file(root, name, MAX_MANIFEST_BYTES)
        if len(raw) != entry.nbytes or hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise ManifestInvalid(name, "does not match the hash in the manifest")
