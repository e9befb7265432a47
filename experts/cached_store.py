"""A store of which this machine has the description and some records; the others come when they are asked for.

Opens in place of an `ExpertStore` wherever experts alone are read: a record that is not in the node's cache is fetched
first, and one whose bytes on the disk are not what they were is fetched again. Holds no backbone. Used by
`experts.near_store` and `sage-moe store sync`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from experts.errors import (
    ExpertCorrupt,
    ExpertError,
    RecordNotHeld,
    SourceFailed,
    StoreDamaged,
    WeightsUnavailable,
)
from experts.file_reads import fill, fill_blocks, reopen_direct
from experts.record_fetcher import FetchProgress, RecordFetcher
from experts.store import ExpertStore
from experts.store_cache import StoreCache, record_sha256, record_stem
from experts.weight_sources import WeightSource, close_all
from extraction.errors import ExtractionError
from extraction.expert_index import INDEX_NAME
from extraction.files import open_regular
from extraction.manifest import MANIFEST_NAME, ExpertKey, ExpertRecord, Manifest

logger = logging.getLogger(__name__)


class CachedStore(ExpertStore):
    """See `ExpertStore`. `root` is the description's folder in the cache."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        manifest_hash: str,
        index: dict[ExpertKey, ExpertRecord],
        cache: StoreCache,
        sources: Sequence[WeightSource],
    ) -> None:
        super().__init__(root, manifest, manifest_hash, index)
        numbers = {component.name: number for number, component in enumerate(manifest.components)}
        self._stems = {key: record_stem(numbers[key.component], key.layer, key.expert) for key in index}
        self._cache = cache
        self._fetcher = RecordFetcher(cache, manifest_hash, index, self._stems, sources)

    @classmethod
    def join(
        cls,
        cache: StoreCache,
        store_hash: str,
        sources: Sequence[WeightSource],
        keys: Collection[ExpertKey] | None = None,
    ) -> CachedStore:
        """Open a store in a cache, and begin to fetch these experts; None means all.

        Cache and sources belong to the store from now on, also where this fails. Raises WeightsUnavailable when nobody
        gives the description, UnknownExpert, CacheTooSmall, CacheDiskFull or CacheUnusable.
        """
        try:
            plain = _open_described(cache, store_hash, sources)
            index = {key: plain.record(key) for key in plain.expert_keys()}
            plain.close()
            store = cls(plain.root, plain.manifest, plain.hash, index, cache, sources)
        except ExpertError:
            close_all(sources)
            cache.close()
            raise
        try:
            store.need(store.expert_keys() if keys is None else keys)
        except ExpertError:
            store.close()
            raise
        return store

    def need(self, keys: Collection[ExpertKey]) -> None:
        """Keep these on this machine's disk, beside those that were needed before; returns at once.

        Raises UnknownExpert, CacheTooSmall, CacheDiskFull or CacheUnusable.
        """
        records = {key: self.record(key) for key in keys}
        self._cache.need(self.hash, {self._stems[key]: record.nbytes for key, record in records.items()})
        self._fetcher.refresh()
        self._fetcher.want(keys)

    def free_bytes(self) -> int:
        """For further records; see `StoreCache.free_bytes`."""
        return self._cache.free_bytes()

    def progress(self) -> FetchProgress:
        """Of what is needed."""
        return self._fetcher.progress()

    def wait(self, timeout_s: float) -> bool:
        """Whether all that is needed is on the disk within that time."""
        return self._fetcher.wait(timeout_s)

    def use_sources(self, sources: Sequence[WeightSource]) -> None:
        """See `RecordFetcher.use_sources`."""
        self._fetcher.use_sources(sources)

    def held_experts(self) -> frozenset[ExpertKey]:
        """Experts whose records are on this machine's disk now, whichever process has brought them. Raises
        CacheUnusable."""
        self._fetcher.refresh()
        return self._fetcher.held()

    def holds(self, key: ExpertKey) -> bool:
        """See ExpertStore.holds."""
        return self._fetcher.path_of(key) is not None

    def read_expert(self, key: ExpertKey) -> Tensor:
        """See ExpertStore.read_expert; waits until the record was fetched. Raises like `read_into`."""
        return self.read_into(key, torch.empty(self.record(key).nbytes, dtype=torch.uint8))

    def read_into(self, key: ExpertKey, window: Tensor, *, direct: bool = False) -> Tensor:
        """See ExpertStore.read_into. A record that is damaged on the disk is fetched once more.

        Raises WeightsUnavailable, CacheDiskFull or CacheUnusable too.
        """
        record = self.record(key)
        fault = ""
        for _ in range(2):
            path = self._fetcher.bring(key)
            try:
                raw = _read_file(path, record.nbytes, window, direct=direct)
                if key in self._verified or _sha256(raw) == record_sha256(path):
                    self._verified.add(key)
                    return raw
                fault = "the bytes were altered"
            except (ExtractionError, OSError) as error:
                fault = str(error)
            logger.warning("%s: %s; it is fetched again", path, fault)
            self._verified.discard(key)
            self._fetcher.drop(key, path)
        raise ExpertCorrupt(str(tuple(key)), str(self.root), 0, fault)

    def chunks(self, key: ExpertKey, chunk_bytes: int) -> Iterator[memoryview]:
        """See ExpertStore.chunks; fetches nothing. Raises StoreDamaged for what is not there."""
        path, record = self._fetcher.path_of(key), self.record(key)
        if path is None:
            raise StoreDamaged(str(self.root), f"does not hold expert {tuple(key)}")
        buffer = memoryview(bytearray(min(chunk_bytes, record.nbytes)))
        try:
            descriptor = open_regular(path)
            with os.fdopen(descriptor, "rb"):
                for start in range(0, record.nbytes, chunk_bytes):
                    piece = buffer[: record.nbytes - start]
                    if not fill(descriptor, start, piece):
                        raise StoreDamaged(str(path), "is cut short")
                    yield piece
        except (ExtractionError, OSError) as error:
            raise StoreDamaged(str(path), str(error)) from error

    def check_digest(self, key: ExpertKey, sha256: str) -> None:
        """See ExpertStore.check_digest; a damaged record leaves the cache."""
        path = self._fetcher.path_of(key)
        if path is None or record_sha256(path) != sha256:
            if path is not None:
                self._fetcher.drop(key, path)
            raise ExpertCorrupt(str(tuple(key)), str(self.root), 0, "the bytes were altered")

    def check_places(self, keys: Collection[ExpertKey]) -> None:  # type: ignore[override]
        """Nothing to check: what is not here is fetched. Raises UnknownExpert."""
        for key in keys:
            self.record(key)

    def read_tensor(self, component: str, name: str) -> Tensor:
        """Raises StoreDamaged: a cache has experts only."""
        raise StoreDamaged(str(self.root), f"holds experts only, not tensor {name!r} of {component!r}")

    def close(self) -> None:
        """What was needed may leave the cache from now on."""
        self._fetcher.close()
        self._cache.close()
        super().close()


def _open_described(cache: StoreCache, store_hash: str, sources: Sequence[WeightSource]) -> ExpertStore:
    """The description that the cache has, or the first that a source gives; damaged files are replaced."""
    folder = cache.folder(store_hash)
    try:
        return _open_as(folder, store_hash)
    except StoreDamaged as damage:
        if (folder / MANIFEST_NAME).exists():
            logger.warning("%s; its description is fetched again", damage)
    reasons = []
    for source in sources:
        try:
            files = source.description()
            _check_description(source.name, files, store_hash)
        except (SourceFailed, RecordNotHeld) as error:
            reasons.append(str(error))
            continue
        cache.describe(store_hash, files)
        return _open_as(folder, store_hash)
    raise WeightsUnavailable(f"the description of store {store_hash[:12]}", "; ".join(reasons) or "no source")


def _open_as(folder: Path, store_hash: str) -> ExpertStore:
    store = ExpertStore.open(folder)
    if store.hash != store_hash:
        store.close()
        raise StoreDamaged(str(folder), "has a manifest that another store's name stands for")
    return store


def _check_description(source: str, files: Mapping[str, bytes], store_hash: str) -> None:
    """Raises SourceFailed for what the store's hash does not stand for, or what would take other files' places."""
    if hashlib.sha256(files[MANIFEST_NAME]).hexdigest() != store_hash:
        raise SourceFailed(source, f"gave another manifest than that of store {store_hash[:12]}")
    for name in files:
        if PurePosixPath(name).parts[0] in ("records", "experts", "backbone") or name.startswith("."):
            raise SourceFailed(source, f"lists {name!r} among the store's descriptions")
    if INDEX_NAME not in files:
        raise SourceFailed(source, f"lists no {INDEX_NAME}")


def _read_file(path: Path, nbytes: int, window: Tensor, *, direct: bool) -> Tensor:
    """A record's file into a window; returns the part of it that is the record. Raises ExtractionError or OSError."""
    raw = window[:nbytes]
    descriptor = open_regular(path)
    try:
        if os.fstat(descriptor).st_size != nbytes:
            raise OSError(f"has another size than {nbytes} bytes")
        if direct and (beside := reopen_direct(descriptor)) is not None:
            with closing(os.fdopen(beside, "rb")):
                if fill_blocks(beside, 0, nbytes, window):
                    return raw
        if not fill(descriptor, 0, raw.numpy().data):
            raise OSError("is cut short")
        return raw
    finally:
        os.close(descriptor)


def _sha256(raw: Tensor) -> str:
    return hashlib.sha256(raw.numpy().data).hexdigest()
