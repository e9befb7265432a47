"""Proves that a store holds a checkpoint: every tensor bit for bit, or converted as recorded, and all experts.

Of quantised parts it proves that codes and scales are, bit for bit, those that the checkpoint's values give.

Reads everything, both sides; holds nothing but buffers. Trusts neither the store's index nor its hashes: places come
from the manifest and the index, what must be at them from the checkpoint. `sage-moe extract SOURCE STORE --verify`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from extraction.copying import BUFFER_BYTES, Meter, Progress, num_threads, read_chunks, whole_units
from extraction.dtypes import convert
from extraction.errors import ManifestInvalid, StoreDiffers
from extraction.expert_index import INDEX_NAME, read_expert_index
from extraction.files import open_inside
from extraction.manifest import (
    ITEM_SIZES,
    MANIFEST_NAME,
    ExpertKey,
    ExpertRecord,
    LeftOut,
    Manifest,
    RecordPart,
    TensorEntry,
    check_files,
    read_manifest,
)
from extraction.plan import ExtractionPlan, SourceTensor, plan_extraction
from extraction.quantise import Quantization, quantise_rows
from extraction.quantised_parts import QuantisedParts
from extraction.selection import without
from extraction.store_files import stored_tensors


@dataclass(frozen=True)
class VerifyReport:
    """What was found equal."""

    num_experts: int
    num_backbone_tensors: int
    weight_bytes: int
    """Of the checkpoint."""
    left_out: LeftOut | None


@dataclass(frozen=True)
class _Pair:
    """Bytes of the checkpoint and of the store that must be the same values."""

    source: SourceTensor
    file: str
    offset: int
    nbytes: int
    dtype: str
    """Or the scheme, where the bytes are codes."""
    scales: RecordPart | None = None


@dataclass(frozen=True)
class _Owner:
    """What the store hashes together."""

    pairs: tuple[_Pair, ...]
    sha256: str | None
    quantization: Quantization | None = None


def verify(store: Path, source: Path, *, progress: Progress | None = None) -> VerifyReport:
    """Raises StoreDiffers for the first difference, or another ExtractionError for what cannot be read."""
    manifest = read_manifest(store)
    check_files(store, manifest)
    index = read_expert_index(store, manifest)
    plan = without(plan_extraction(source), manifest.left_out)
    _check_descriptions(plan, manifest)
    owners = [
        *_backbone(plan, manifest, manifest.quantised),
        *_experts(plan, index, manifest.quantization),
    ]
    weights = Path(manifest.source_root) if manifest.source_root else store
    meter = Meter(sum(pair.source.nbytes for owner in owners for pair in owner.pairs), progress)
    with ThreadPoolExecutor(num_threads(), thread_name_prefix="verify") as pool:
        futures = [pool.submit(_compare, owner, source, weights, meter) for owner in owners]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return VerifyReport(len(plan.experts), plan.num_backbone_tensors, plan.weight_bytes, manifest.left_out)


def _check_descriptions(plan: ExtractionPlan, manifest: Manifest) -> None:
    for name, content in plan.small_files.items():
        entry = manifest.files.get(name)
        if entry is None or entry.sha256 != hashlib.sha256(content).hexdigest():
            raise ManifestInvalid(name, "is another one than the checkpoint's")
    ours, theirs = [part.name for part in manifest.components], [part.name for part in plan.components]
    if ours != theirs:
        raise ManifestInvalid(MANIFEST_NAME, f"has components {ours}, the checkpoint has {theirs}")


def _backbone(plan: ExtractionPlan, manifest: Manifest, quantised: QuantisedParts) -> Iterator[_Owner]:
    for part, component in zip(plan.components, manifest.components, strict=True):
        entries = {entry.name: entry for entry in component.tensors}
        expected = stored_tensors(part, quantised)
        surplus = entries.keys() - expected.keys()
        if surplus:
            entry = entries[min(surplus)]
            raise StoreDiffers(entry.name, entry.file, entry.offset, "the checkpoint has no such tensor")
        for name, (tensor, quantization) in expected.items():
            found = entries.get(name)
            if found is None:
                raise _absent(tensor, MANIFEST_NAME)
            if found.shape != tensor.shape or found.source != tensor.name:
                reason = f"is kept as {found.source} of shape {list(found.shape)}, not {list(tensor.shape)}"
                raise StoreDiffers(tensor.name, found.file, found.offset, reason)
            yield _Owner((_pair(tensor, found, quantization),), found.sha256, quantization)


def _pair(tensor: SourceTensor, entry: TensorEntry, quantization: Quantization | None) -> _Pair:
    """Raises StoreDiffers where only one of the two is quantised."""
    if quantization is None and entry.dtype in ITEM_SIZES:
        return _Pair(tensor, entry.file, entry.offset, entry.nbytes, entry.dtype)
    if quantization is None or entry.dtype != quantization.scheme:
        reason = f"is kept as {entry.dtype}, other than the store says of it"
        raise StoreDiffers(tensor.name, entry.file, entry.offset, reason)
    code_bytes = quantization.code_bytes(tensor.shape)
    scales = RecordPart(
        "scales", entry.file, entry.offset + code_bytes, quantization.scale_bytes(tensor.shape)
    )
    return _Pair(tensor, entry.file, entry.offset, code_bytes, entry.dtype, scales)


def _experts(
    plan: ExtractionPlan, index: Mapping[ExpertKey, ExpertRecord], quantization: Quantization | None
) -> Iterator[_Owner]:
    surplus = index.keys() - plan.experts.keys()
    if surplus:
        part = index[min(surplus)].parts[0]
        name = " ".join(map(str, min(surplus)))
        raise StoreDiffers(name, part.file, part.offset, "the checkpoint has no such expert")
    for key, tensors in plan.experts.items():
        record = index.get(key)
        if record is None:
            raise _absent(tensors[0], INDEX_NAME)
        parts = record.parts[: len(tensors)]
        scales = record.parts[len(tensors) :] or (None,) * len(tensors)
        pairs = tuple(
            _Pair(tensor, part.file, part.offset, part.nbytes, record.dtype, scale)
            for tensor, part, scale in zip(tensors, parts, scales, strict=True)
        )
        yield _Owner(pairs, record.sha256, quantization)


def _absent(tensor: SourceTensor, file: str) -> StoreDiffers:
    reason = f"has no entry for it; the checkpoint has it in {tensor.file} at offset {tensor.offset}"
    return StoreDiffers(tensor.name, file, 0, reason)


def _compare(owner: _Owner, source: Path, weights: Path, meter: Meter) -> None:
    digest = hashlib.sha256()
    scales = []
    for pair in owner.pairs:
        with _opened(source, pair.source.file) as original, _opened(weights, pair.file) as kept:
            if owner.quantization is None:
                _compare_values(pair, original, kept, digest.update)
            else:
                scales.append(_compare_quantised(pair, owner.quantization, original, kept, digest.update))
        meter.add(pair.source.nbytes)
    for raw in scales:
        digest.update(raw)
    if owner.sha256 is not None and digest.hexdigest() != owner.sha256:
        first = owner.pairs[0]
        raise StoreDiffers(
            first.source.name, first.file, first.offset, "the bytes are right, the recorded hash is not"
        )


@contextmanager
def _opened(root: Path, file: str) -> Iterator[int]:
    descriptor = open_inside(root, file)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_size(tensor: SourceTensor, file: str, offset: int, nbytes: int, expected_bytes: int) -> None:
    if nbytes != expected_bytes:
        reason = f"has {nbytes} bytes there, {expected_bytes} expected"
        raise StoreDiffers(tensor.name, file, offset, reason)


def _compare_values(pair: _Pair, original: int, kept: int, update: Callable[[memoryview], None]) -> None:
    tensor = pair.source
    expected_bytes = tensor.nbytes // ITEM_SIZES[tensor.dtype] * ITEM_SIZES[pair.dtype]
    _check_size(tensor, pair.file, pair.offset, pair.nbytes, expected_bytes)
    position = pair.offset
    buffer = bytearray(BUFFER_BYTES)
    kept_buffer = bytearray(BUFFER_BYTES // ITEM_SIZES[tensor.dtype] * ITEM_SIZES[pair.dtype])
    theirs = read_chunks(original, tensor.file, tensor.offset, tensor.nbytes, tensor.name, buffer)
    ours = read_chunks(kept, pair.file, pair.offset, pair.nbytes, tensor.name, kept_buffer)
    for chunk, found in zip(theirs, ours, strict=True):
        try:
            expected = convert(chunk, tensor.dtype, pair.dtype)
        except OverflowError as error:
            reason = f"values of {tensor.file} are beyond the range of {error}"
            raise StoreDiffers(tensor.name, pair.file, position, reason) from error
        _check_equal(tensor, pair.file, position, expected, found)
        update(found)
        position += len(found)


def _compare_quantised(
    pair: _Pair, quantization: Quantization, original: int, kept: int, update: Callable[[memoryview], None]
) -> bytes:
    """Quantise again, some rows at a time. Returns the scales, which the hash covers behind all codes."""
    tensor, scales = pair.source, pair.scales
    assert scales is not None  # the index was read with this quantisation
    shape, position, scales_position = tensor.shape, pair.offset, scales.offset
    _check_size(tensor, pair.file, pair.offset, pair.nbytes, quantization.code_bytes(shape))
    _check_size(tensor, scales.file, scales.offset, scales.nbytes, quantization.scale_bytes(shape))
    if scales.file != pair.file:
        raise StoreDiffers(tensor.name, scales.file, scales.offset, "has scales in another file than codes")
    buffer = bytearray(whole_units(shape[-1] * ITEM_SIZES[tensor.dtype]))
    whole = bytearray()
    for chunk in read_chunks(original, tensor.file, tensor.offset, tensor.nbytes, tensor.name, buffer):
        try:
            expected = quantise_rows(chunk, tensor.dtype, shape[-1], quantization)
        except ValueError as error:
            reason = f"a tensor of {tensor.file} {error}"
            raise StoreDiffers(tensor.name, pair.file, position, reason) from error
        found = _read(kept, pair.file, position, len(expected[0]), tensor.name)
        found_scales = _read(kept, pair.file, scales_position, len(expected[1]), tensor.name)
        _check_equal(tensor, pair.file, position, expected[0], found)
        _check_equal(tensor, pair.file, scales_position, expected[1], found_scales)
        update(found)
        whole += found_scales
        position, scales_position = position + len(found), scales_position + len(found_scales)
    return bytes(whole)


def _read(descriptor: int, file: str, offset: int, nbytes: int, tensor: str) -> memoryview:
    (found,) = read_chunks(descriptor, file, offset, nbytes, tensor, bytearray(nbytes))
    return found


def _check_equal(
    tensor: SourceTensor, file: str, position: int, expected: memoryview, found: memoryview
) -> None:
    first = _first_difference(expected, found)
    if first is not None:
        reason = f"differs from {tensor.file}, whose tensor starts at offset {tensor.offset}"
        raise StoreDiffers(tensor.name, file, position + first, reason)


def _first_difference(expected: memoryview, found: memoryview) -> int | None:
    import numpy as np

    differs = np.frombuffer(expected, np.uint8) != np.frombuffer(found, np.uint8)
    return int(differs.argmax()) if differs.any() else None
