"""The store as one machine has it: in place where it is on a disk here, else in the node's cache.

Decides between the two; the order of sources is that of `StoreSource`. Used by `experts.actor` and
`sage-moe store sync`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.cached_store import CachedStore
from experts.errors import ExpertCorrupt, StoreDamaged, WeightsUnavailable
from experts.mounts import is_on_network
from experts.store import ExpertStore
from experts.store_cache import StoreCache
from experts.weight_sources import FolderSource, ServerSource, WeightSource
from extraction.manifest import ExpertKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreSource:
    """Where a machine finds a store, in the order in which it looks."""

    store_hash: str
    paths: tuple[str, ...] = ()
    """Folders that may hold it here: on a disk of this machine, in which case it is used there, or on a shared one."""
    peers: tuple[tuple[str, int], ...] = ()
    """Host and port of machines that have some of its records."""
    head: tuple[str, int] | None = None
    """Host and port of who reads the whole store."""


@dataclass(frozen=True)
class CacheSpec:
    """The folder on every machine that keeps what came from elsewhere."""

    folder: str
    limit_bytes: int | None = None


def open_near(
    source: StoreSource,
    keys: Collection[ExpertKey],
    cache: CacheSpec | None,
    secret: bytes,
    is_remote: Callable[[Path], bool] = is_on_network,
) -> ExpertStore:
    """The store with these records, there or on their way.

    Raises WeightsUnavailable, CacheTooSmall, CacheDiskFull or CacheUnusable.
    """
    others, reasons = [], []
    for path in map(Path, source.paths):
        if cache is not None and is_remote(path):
            others.append(path)
            continue
        try:
            return _open_whole(path, source.store_hash, keys)
        except StoreDamaged as error:
            reasons.append(str(error))
        except ExpertCorrupt as error:  # the store is there, but not these of its records
            reasons.append(str(error))
            others.append(path)
    if cache is None:
        advice = "; give every machine the store, or a --store-cache"
        raise WeightsUnavailable(f"store {source.store_hash[:12]}", "; ".join(reasons) + advice)
    folder = StoreCache(Path(cache.folder), cache.limit_bytes)
    return CachedStore.join(folder, source.store_hash, list_sources(source, others, secret), keys)


def list_sources(source: StoreSource, folders: Sequence[Path], secret: bytes) -> list[WeightSource]:
    """folders: those of `paths` that are copied from."""
    listed: list[WeightSource] = [FolderSource(path, source.store_hash) for path in folders]
    listed += [
        ServerSource(*peer, secret=secret, store_hash=source.store_hash, is_origin=False)
        for peer in source.peers
    ]
    if source.head is not None:
        listed.append(ServerSource(*source.head, secret=secret, store_hash=source.store_hash, is_origin=True))
    return listed


def _open_whole(path: Path, store_hash: str, keys: Collection[ExpertKey]) -> ExpertStore:
    """Raises StoreDamaged where no such store is there, ExpertCorrupt where records of it are missing."""
    store = ExpertStore.open(path)
    try:
        if store.hash != store_hash:
            raise StoreDamaged(str(path), "holds another store")
        try:
            store.check_places(keys)
        except StoreDamaged as damage:
            raise ExpertCorrupt("of this group", damage.file, 0, damage.reason) from damage
    except (StoreDamaged, ExpertCorrupt):
        store.close()
        raise
    return store
