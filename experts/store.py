"""Reads an expert store: one expert in one read, every byte checked before it is used the first time.

Nothing of the store is trusted: paths stay inside its folder, sizes are checked, hashes are compared at the first
load of each record. Records of an index over original shards carry no hash; theirs is recorded at the first load and
compared from then on. Safe for several threads. Used by `experts.worker` and `router.weights`.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from experts.errors import ExpertCorrupt, StoreDamaged, UnknownExpert
from experts.hash_log import HashLog
from extraction.errors import ExtractionError
from extraction.files import open_inside
from extraction.manifest import (
    ITEM_SIZES,
    Component,
    ExpertKey,
    ExpertRecord,
    Manifest,
    TensorEntry,
    check_files,
    read_expert_index,
    read_manifest,
    store_hash,
)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExpertStore:
    """An open store. `hash` names it: it changes with any weight of a copied store."""

    def __init__(
        self, root: Path, manifest: Manifest, manifest_hash: str, index: dict[ExpertKey, ExpertRecord]
    ) -> None:
        self.root, self.manifest, self.hash = root, manifest, manifest_hash
        self._index = index
        self._weights_root = Path(manifest.source_root) if manifest.source_root else root
        self._tensors = {
            (component.name, tensor.name): tensor
            for component in manifest.components
            for tensor in component.tensors
        }
        self._descriptors: dict[str, int] = {}
        self._verified: set[ExpertKey] = set()
        self._recorded = HashLog(root)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path) -> ExpertStore:
        """Check the descriptions; read no weights. Raises StoreDamaged."""
        try:
            manifest = read_manifest(root)
            check_files(root, manifest)
            index = read_expert_index(root, manifest)
            manifest_hash = store_hash(root)
        except ExtractionError as error:
            raise StoreDamaged(str(root), str(error)) from error
        _check_complete(root, manifest, index)
        return cls(root, manifest, manifest_hash, index)

    def component(self, name: str) -> Component:
        for component in self.manifest.components:
            if component.name == name:
                return component
        raise StoreDamaged(str(self.root), f"has no component {name!r}")

    def expert_keys(self, component: str | None = None) -> tuple[ExpertKey, ...]:
        """Sorted by component, layer, expert."""
        return tuple(sorted(key for key in self._index if component in (None, key.component)))

    def record(self, key: ExpertKey) -> ExpertRecord:
        record = self._index.get(key)
        if record is None:
            raise UnknownExpert(str(tuple(key)))
        return record

    def read_expert(self, key: ExpertKey) -> Tensor:
        """Gate, up and down back to back, (nbytes,) uint8; 64-byte aligned.

        Raises ExpertCorrupt after one retry, or UnknownExpert.
        """
        record = self.record(key)
        try:
            return self._read_checked(record)
        except ExpertCorrupt:
            return self._read_checked(record)

    def read_tensor(self, component: str, name: str) -> Tensor:
        """A backbone tensor in its stored dtype and shape. Raises StoreDamaged."""
        entry = self._tensors.get((component, name))
        if entry is None:
            raise StoreDamaged(str(self.root), f"has no tensor {name!r} in component {component!r}")
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        if not self._read_into(entry.file, entry.offset, raw):
            raise StoreDamaged(entry.file, f"is cut short inside tensor {name!r} at offset {entry.offset}")
        if entry.sha256 is not None and _sha256(raw) != entry.sha256:
            raise StoreDamaged(entry.file, f"tensor {name!r} at offset {entry.offset} was altered")
        return raw.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _read_checked(self, record: ExpertRecord) -> Tensor:
        raw = torch.empty(record.nbytes, dtype=torch.uint8)
        first = record.parts[0]
        position = 0
        for file, offset, nbytes in _reads(record):
            if not self._read_into(file, offset, raw[position : position + nbytes]):
                raise ExpertCorrupt(str(tuple(record.key)), file, offset, "the file is cut short")
            position += nbytes
        if record.key not in self._verified:
            digest = _sha256(raw)
            expected = record.sha256 or self._recorded.expect(record.key, digest)
            if digest != expected:
                raise ExpertCorrupt(
                    str(tuple(record.key)), first.file, first.offset, "the bytes were altered"
                )
            self._verified.add(record.key)
        return raw

    def _read_into(self, file: str, offset: int, raw: Tensor) -> bool:
        """Fill `raw` from the file. False when the file ends before."""
        descriptor = self._descriptor(file)
        target = raw.numpy().data
        while target:
            try:
                count = os.preadv(descriptor, [target], offset)
            except OSError as error:
                raise StoreDamaged(file, f"cannot be read at offset {offset}: {error.strerror}") from error
            if count == 0:
                return False
            target, offset = target[count:], offset + count
        return True

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = open_inside(self._weights_root, file)
                except ExtractionError as error:
                    raise StoreDamaged(str(self._weights_root), str(error)) from error
            return self._descriptors[file]


def _reads(record: ExpertRecord) -> list[tuple[str, int, int]]:
    """File, offset and length of each read: one where the record is contiguous."""
    if record.is_contiguous:
        return [(record.parts[0].file, record.parts[0].offset, record.nbytes)]
    return [(part.file, part.offset, part.nbytes) for part in record.parts]


def _sha256(raw: Tensor) -> str:
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _check_complete(root: Path, manifest: Manifest, index: dict[ExpertKey, ExpertRecord]) -> None:
    """Every layer has experts 0 to E-1, E is the same everywhere, and sizes agree."""
    for component in manifest.components:
        layers: dict[int, list[int]] = {}
        for key in index:
            if key.component == component.name:
                layers.setdefault(key.layer, []).append(key.expert)
        counts = {len(experts) for experts in layers.values()}
        for layer, experts in layers.items():
            if len(counts) > 1 or sorted(experts) != list(range(len(experts))):
                raise StoreDamaged(
                    str(root), f"lacks experts in layer {layer} of component {component.name!r}"
                )
        for tensor in component.tensors:
            _check_size(root, tensor)
    if len({record.nbytes // ITEM_SIZES[record.dtype] for record in index.values()}) > len(
        manifest.components
    ):
        raise StoreDamaged(str(root), "has experts of different sizes in one component")
    if (manifest.kind == "indexed") != (manifest.source_root is not None):
        raise StoreDamaged(str(root), "names no folder of original shards, or one that it does not use")
    unknown = {key.component for key in index} - {component.name for component in manifest.components}
    if unknown:
        raise StoreDamaged(str(root), f"lists experts of unknown components {sorted(unknown)}")


def _check_size(root: Path, tensor: TensorEntry) -> None:
    if (
        math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype] != tensor.nbytes
        or min(tensor.shape, default=1) < 0
    ):
        raise StoreDamaged(
            str(root), f"tensor {tensor.name!r}: {tensor.nbytes} bytes do not hold {tensor.shape}"
        )
