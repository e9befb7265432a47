"""Reads an expert store: one expert in one read, every byte checked before it is used the first time.

Nothing of the store is trusted: paths stay inside its folder, sizes are checked, hashes are compared at the first
load of each record. An index over original shards carries no hashes: there the places must be those of tensors in
the shard's own header, and hashes are recorded at the first load and compared from then on. Safe for several threads.
Used by `experts.worker`, `experts.weight_server` and `router.weights`.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experts.errors import ExpertCorrupt, StoreDamaged, UnknownExpert
from experts.file_reads import BLOCK_BYTES, fill, fill_blocks, reopen_direct
from experts.hash_log import HashLog
from extraction.decoder_config import read_decoder
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
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from extraction.safetensors_file import CODES, TensorHeader, read_header

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
        self._weights_root = Path(manifest.source_root) if manifest.source_root else root
        self._tensors = {
            (component.name, tensor.name): tensor
            for component in manifest.components
            for tensor in component.tensors
        }
        self._descriptors: dict[str, int] = {}
        self._direct: dict[str, int | None] = {}
        """Descriptors for reads past the page cache; None where the file system refuses them."""
        self._headers: dict[str, list[TensorHeader]] = {}
        """Tensors of open original shards, by offset."""
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
            raw = window[skipped : skipped + record.nbytes]
            if not self._read_blocks(first.file, first.offset - skipped, skipped + record.nbytes, window):
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
                if not self._read_into(file, offset + done, buffer[filled : filled + count]):
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
            reason = f"has tensor {name!r} as {entry.dtype}, the manifest says {quantization.name}"
            raise StoreDamaged(entry.file, reason)
        outputs, inputs = entry.shape
        sizes = (quantization.code_bytes(entry.shape), quantization.scale_bytes(entry.shape))
        codes, scales = self._read_entry(component, entry, sizes)
        scales = scales.view(torch.bfloat16).view(quantization.scale_shape(entry.shape))
        return codes.view(quantization.code_shape(entry.shape)), scales, (outputs, inputs)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            for direct in self._direct.values():
                if direct is not None:
                    os.close(direct)
            self._descriptors.clear()
            self._direct.clear()
            self._headers.clear()

    def _entry(self, component: str, name: str) -> TensorEntry:
        """Raises StoreDamaged."""
        entry = self._tensors.get((component, name))
        if entry is None:
            raise StoreDamaged(str(self.root), f"has no tensor {name!r} in component {component!r}")
        return entry

    def _read_entry(self, component: str, entry: TensorEntry, sizes: Sequence[int]) -> list[Tensor]:
        """Its bytes, cut into buffers of these sizes. Raises StoreDamaged."""
        cut_short = f"is cut short inside tensor {entry.name!r} at offset {entry.offset}"
        if not self._holds(entry.file, entry.offset, entry.nbytes):
            raise StoreDamaged(entry.file, cut_short)
        self._check_indexed(entry.file, entry.offset, entry.nbytes, entry.dtype)
        parts, offset, digest = [], entry.offset, hashlib.sha256()
        for size in sizes:
            raw = torch.empty(size, dtype=torch.uint8)
            if not self._read_into(entry.file, offset, raw):
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
            if not self._holds(part.file, part.offset, part.nbytes):
                raise ExpertCorrupt(str(tuple(record.key)), part.file, part.offset, "the file is cut short")
            self._check_indexed(part.file, part.offset, part.nbytes, record.dtype)

    def _read_parts(self, record: ExpertRecord, raw: Tensor) -> None:
        position = 0
        for file, offset, nbytes in _reads(record):
            if not self._read_into(file, offset, raw[position : position + nbytes]):
                raise ExpertCorrupt(str(tuple(record.key)), file, offset, "the file is cut short")
            position += nbytes

    def _check_hash(self, record: ExpertRecord, raw: Tensor) -> None:
        """At the first load of a record. Raises ExpertCorrupt."""
        if record.key in self._verified:
            return
        self.check_digest(record.key, _sha256(raw))
        self._verified.add(record.key)

    def _holds(self, file: str, offset: int, nbytes: int) -> bool:
        return offset + nbytes <= os.fstat(self._descriptor(file)).st_size

    def _check_indexed(self, file: str, offset: int, nbytes: int, dtype: str) -> None:
        """An original shard may have been replaced by another since it was indexed. Raises StoreDamaged."""
        if self.manifest.kind == "copied":
            return
        tensor = self._tensor_at(file, offset, nbytes)
        if tensor is None or tensor.code != CODES[dtype]:
            raise StoreDamaged(
                file,
                f"has no {dtype} tensor of {nbytes} bytes at offset {offset}: it is not what was indexed",
            )

    def _tensor_at(self, file: str, offset: int, nbytes: int) -> TensorHeader | None:
        """The tensor that these bytes are, or the stack of equal matrices (three dimensions) that they are one of."""
        tensors = self._headers[file]
        index = bisect.bisect_right(tensors, offset, key=lambda tensor: tensor.offset) - 1
        while index >= 0 and not tensors[index].nbytes:
            index -= 1
        if index < 0:
            return None
        tensor = tensors[index]
        skipped = offset - tensor.offset
        if (skipped, nbytes) == (0, tensor.nbytes):
            return tensor
        is_stack = len(tensor.shape) == 3 and not skipped % nbytes and not tensor.nbytes % nbytes
        return tensor if is_stack and skipped + nbytes <= tensor.nbytes else None

    def _read_blocks(self, file: str, start: int, nbytes: int, window: Tensor) -> bool:
        """See `fill_blocks`."""
        descriptor = self._direct_descriptor(file)
        if descriptor is None:
            return False
        try:
            return fill_blocks(descriptor, start, nbytes, window)
        except OSError as error:
            raise StoreDamaged(file, f"cannot be read at offset {start}: {error.strerror}") from error

    def _direct_descriptor(self, file: str) -> int | None:
        descriptor = self._descriptor(file)
        with self._lock:
            if file not in self._direct:
                self._direct[file] = reopen_direct(descriptor)
            return self._direct[file]

    def _read_into(self, file: str, offset: int, raw: Tensor) -> bool:
        """Fill `raw` from the file. False when the file ends before."""
        try:
            return fill(self._descriptor(file), offset, raw.numpy().data)
        except OSError as error:
            raise StoreDamaged(file, f"cannot be read at offset {offset}: {error.strerror}") from error

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = self._open(file)
                except ExtractionError as error:
                    raise StoreDamaged(str(self._weights_root), str(error)) from error
            return self._descriptors[file]

    def _open(self, file: str) -> int:
        descriptor = open_inside(self._weights_root, file)
        if self.manifest.kind == "indexed":
            try:
                header = read_header(descriptor, file)
            except ExtractionError:
                os.close(descriptor)
                raise
            self._headers[file] = sorted(header.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
        return descriptor


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
