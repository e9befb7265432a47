"""Reads an expert store: one expert in one read, every byte checked before it is used the first time.

Nothing of the store is trusted: paths stay inside its folder, sizes are checked, hashes are compared at the first
load of each record. An index over original shards carries no hashes: there the places must be those of tensors in
the shard's own header, and hashes are recorded at the first load and compared from then on. Safe for several threads.
Used by `experts.worker`, `experts.weight_server` and `router.weights`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experts.errors import ExpertCorrupt, StoreDamaged, UnknownExpert
from experts.file_reads import BLOCK_BYTES
from experts.hash_log import HashLog
from experts.huge_pages import weight_bytes
from experts.weight_files import WeightFiles
from extraction.decoder_config import read_decoder
from extraction.errors import ExtractionError
from extraction.expert_index import read_expert_index
from extraction.manifest import (
    ITEM_SIZES,
    Component,
    ExpertKey,
    ExpertRecord,
    Manifest,
    TensorEntry,
    check_files,
    read_manifest,
    store_hash,
)
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts

VECTOR_BYTES = 64
"""Alignment of weights in memory, as PyTorch gives it to its own tensors."""

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExpertStore:
    """An open store. `hash` names it: it changes with any weight of a copied store."""

    def __init__(
        self, root: Path, manifest: Manifest, manifest_hash: str, index: dict[ExpertKey, ExpertRecord]
    ) -> None:
        self.root, self.manifest, self.hash = root, manifest, manifest_hash
        self._index = index
        weights_root = Path(manifest.source_root) if manifest.source_root else root
        self._files = WeightFiles(weights_root, is_indexed=manifest.kind == "indexed")
        self._tensors = {
            (component.name, tensor.name): tensor
            for component in manifest.components
            for tensor in component.tensors
        }
        self._verified: set[ExpertKey] = set()
        self._recorded = HashLog(root)

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

    @property
    def served(self) -> Component:
        """The decoder that answers text. Raises StoreDamaged when the store has none."""
        try:
            return self.manifest.served
        except ExtractionError as error:
            raise StoreDamaged(str(self.root), str(error)) from error

    @property
    def quantization(self) -> Quantization | None:
        """Of the experts; None where they are in a float dtype."""
        return self.manifest.quantization

    @property
    def quantised(self) -> QuantisedParts:
        """Of experts, backbone and head."""
        return self.manifest.quantised

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
        self._check_place(self.record(key))  # before anything of that size is allocated
        window = torch.empty(self.record(key).nbytes, dtype=torch.uint8)
        try:
            return self.read_into(key, window)
        except ExpertCorrupt:
            return self.read_into(key, window)

    def window_bytes(self, key: ExpertKey, *, direct: bool) -> int:
        """Size of the buffer that `read_into` needs: with `direct`, the record and what its blocks hold beside it."""
        nbytes = self.record(key).nbytes
        return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES if direct else nbytes

    def read_into(self, key: ExpertKey, window: Tensor, *, direct: bool = False) -> Tensor:
        """Read a record into a buffer; returns the part of it that is the record, 64-byte aligned.

        window: uint8 of `window_bytes`, its memory aligned to BLOCK_BYTES with `direct`: then the page cache is
        passed by where the file system lets it, the record lies in one piece and its place is aligned.
        Raises ExpertCorrupt, StoreDamaged or UnknownExpert.
        """
        record = self.record(key)
        self._check_place(record)
        first = record.parts[0]
        if direct and record.is_contiguous and first.offset % VECTOR_BYTES == 0:
            skipped = first.offset % BLOCK_BYTES
            start, nbytes = first.offset - skipped, skipped + record.nbytes
            raw = window[skipped:nbytes]
            if not self._files.read_blocks(first.file, start, nbytes, window):
                self._read_parts(record, raw)
        else:
            raw = window[: record.nbytes]
            self._read_parts(record, raw)
        self._check_hash(record, raw)
        return raw

    def chunks(self, key: ExpertKey, chunk_bytes: int) -> Iterator[memoryview]:
        """A record's bytes in order, in pieces of `chunk_bytes` and a shorter last one, each overwritten by the next.

        Not compared with the hash: whoever has the whole of it calls `check_digest`.
        Raises ExpertCorrupt, StoreDamaged or UnknownExpert.
        """
        record = self.record(key)
        self._check_place(record)
        buffer = torch.empty(min(chunk_bytes, record.nbytes), dtype=torch.uint8)
        filled = 0
        for file, offset, nbytes in _reads(record):
            done = 0
            while done < nbytes:
                count = min(len(buffer) - filled, nbytes - done)
                if not self._files.read_into(file, offset + done, buffer[filled : filled + count]):
                    raise ExpertCorrupt(str(tuple(key)), file, offset, "the file is cut short")
                done, filled = done + count, filled + count
                if filled == len(buffer):
                    yield buffer.numpy().data
                    filled = 0
        if filled:
            yield buffer[:filled].numpy().data

    def check_digest(self, key: ExpertKey, sha256: str) -> None:
        """Whether bytes of this hash are the record's. Raises ExpertCorrupt, StoreDamaged or UnknownExpert."""
        record = self.record(key)
        component, layer, expert = key
        expected = record.sha256 or self._recorded.expect(f"{component} {layer} {expert}", sha256)
        if sha256 != expected:
            first = record.parts[0]
            raise ExpertCorrupt(str(tuple(key)), first.file, first.offset, "the bytes were altered")

    def holds(self, key: ExpertKey) -> bool:
        """Whether the record can be read here without asking another machine."""
        return key in self._index

    def held_experts(self) -> frozenset[ExpertKey]:
        """Experts whose records this store can read without asking another machine."""
        return frozenset(self._index)

    def check_places(self, keys: Iterable[ExpertKey]) -> None:
        """Whether the files of these records are there and long enough; reads no weights.

        Raises ExpertCorrupt, StoreDamaged or UnknownExpert.
        """
        for key in keys:
            self._check_place(self.record(key))

    def read_tensor(self, component: str, name: str) -> Tensor:
        """A backbone tensor in its stored dtype and shape. Raises StoreDamaged, also where it is quantised."""
        entry = self._entry(component, name)
        if entry.dtype not in TORCH_DTYPES:
            raise StoreDamaged(entry.file, f"has tensor {name!r} as {entry.dtype}, which it cannot be")
        (raw,) = self._read_entry(component, entry, (entry.nbytes,))
        return raw.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

    def read_quantised(
        self, component: str, name: str, quantization: Quantization
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """A quantised backbone matrix: its codes (uint8), its scales (bfloat16), and its (outputs, inputs).

        Raises StoreDamaged, also where it is not quantised in this way.
        """
        entry = self._entry(component, name)
        if entry.dtype != quantization.scheme:
            told = f"has tensor {name!r} as {entry.dtype}, the manifest says {quantization.name}"
            raise StoreDamaged(entry.file, f"{told}: extract the checkpoint again")
        outputs, inputs = entry.shape
        sizes = (quantization.code_bytes(entry.shape), quantization.scale_bytes(entry.shape))
        codes, scales = self._read_entry(component, entry, sizes)
        scales = scales.view(torch.bfloat16).view(quantization.scale_shape(entry.shape))
        return codes.view(quantization.code_shape(entry.shape)), scales, (outputs, inputs)

    def close(self) -> None:
        self._files.close()

    def _entry(self, component: str, name: str) -> TensorEntry:
        """Raises StoreDamaged."""
        entry = self._tensors.get((component, name))
        if entry is None:
            raise StoreDamaged(str(self.root), f"has no tensor {name!r} in component {component!r}")
        return entry

    def _read_entry(self, component: str, entry: TensorEntry, sizes: Sequence[int]) -> list[Tensor]:
        """Its bytes, cut into buffers of these sizes. Raises StoreDamaged."""
        cut_short = f"is cut short inside tensor {entry.name!r} at offset {entry.offset}"
        if not self._files.holds(entry.file, entry.offset, entry.nbytes):
            raise StoreDamaged(entry.file, cut_short)
        self._files.check_indexed(entry.file, entry.offset, entry.nbytes, entry.dtype)
        parts, offset, digest = [], entry.offset, hashlib.sha256()
        for size in sizes:
            raw = weight_bytes(size)
            if not self._files.read_into(entry.file, offset, raw):
                raise StoreDamaged(entry.file, cut_short)
            digest.update(raw.numpy().data)
            parts.append(raw)
            offset += size
        found = digest.hexdigest()
        expected = entry.sha256 or self._recorded.expect(f"{component} {entry.name}", found)
        if found != expected:
            raise StoreDamaged(entry.file, f"tensor {entry.name!r} at offset {entry.offset} was altered")
        return parts

    def _check_place(self, record: ExpertRecord) -> None:
        """Raises ExpertCorrupt where the file ends before, StoreDamaged where it is another file."""
        for part in record.parts:
            if not self._files.holds(part.file, part.offset, part.nbytes):
                raise ExpertCorrupt(str(tuple(record.key)), part.file, part.offset, "the file is cut short")
            self._files.check_indexed(part.file, part.offset, part.nbytes, record.dtype)

    def _read_parts(self, record: ExpertRecord, raw: Tensor) -> None:
        position = 0
        for file, offset, nbytes in _reads(record):
            if not self._files.read_into(file, offset, raw[position : position + nbytes]):
                raise ExpertCorrupt(str(tuple(record.key)), file, offset, "the file is cut short")
            position += nbytes

    def _check_hash(self, record: ExpertRecord, raw: Tensor) -> None:
        """At the first load of a record. Raises ExpertCorrupt."""
        if record.key in self._verified:
            return
        self.check_digest(record.key, _sha256(raw))
        self._verified.add(record.key)


def _reads(record: ExpertRecord) -> list[tuple[str, int, int]]:
    """File, offset and length of each read: one where the record is contiguous."""
    if record.is_contiguous:
        return [(record.parts[0].file, record.parts[0].offset, record.nbytes)]
    return [(part.file, part.offset, part.nbytes) for part in record.parts]


def _sha256(raw: Tensor) -> str:
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _check_complete(root: Path, manifest: Manifest, index: dict[ExpertKey, ExpertRecord]) -> None:
    """In each component every layer has experts 0 to E-1, or of these the share that the store says it has; E is the
    same everywhere, and sizes agree."""
    unknown = {key.component for key in index} - {component.name for component in manifest.components}
    if unknown:
        raise StoreDamaged(str(root), f"lists experts of unknown components {sorted(unknown)}")
    share = manifest.left_out.groups if manifest.left_out is not None else None
    for component in manifest.components:
        layers: dict[int, list[int]] = {}
        sizes = set()
        for key, record in index.items():
            if key.component == component.name:
                layers.setdefault(key.layer, []).append(key.expert)
                sizes.add(record.nbytes // ITEM_SIZES.get(record.dtype, 1))  # quantised ones have one form
        total = _num_experts(manifest, component, layers)
        for layer, experts in layers.items():
            expected = (ExpertKey(component.name, layer, expert) for expert in range(total))
            if sorted(experts) != [key.expert for key in expected if share is None or share.holds(key)]:
                raise StoreDamaged(
                    str(root), f"lacks experts in layer {layer} of component {component.name!r}"
                )
        if len(sizes) > 1:
            raise StoreDamaged(str(root), f"has experts of different sizes in component {component.name!r}")


def _num_experts(manifest: Manifest, component: Component, layers: dict[int, list[int]]) -> int:
    """E; where a store holds a share of the experts, only the configuration knows it. Raises StoreDamaged."""
    if manifest.left_out is None or manifest.left_out.groups is None or not layers:
        return max((len(experts) for experts in layers.values()), default=0)
    try:
        return read_decoder(component.config).num_experts
    except ExtractionError as error:
        raise StoreDamaged(f"component {component.name!r}", str(error)) from error
