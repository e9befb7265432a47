"""The store as one machine has it: in place where it is on a disk here, else in the node's cache.

Decides between the two; the order of sources is that of `StoreSource`. Used by `experts.actor` and
`sage-moe store sync`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from experts.cached_store import CachedStore
from experts.errors import ExpertCorrupt, StoreDamaged, WeightsUnavailable
from experts.loader import check_copies
from experts.mounts import is_on_network
from experts.store import ExpertStore
from experts.store_cache import StoreCache
from experts.store_source import CacheSpec, StoreSource
from experts.weight_sources import FolderSource, ServerSource, WeightSource
from extraction.manifest import ExpertKey


class NearStore:
    """An open store and what else a machine knows of it. Closing it closes the store."""

    def __init__(self, store: ExpertStore, copies: tuple[Path, ...] = ()) -> None:
        """copies: further folders of the same store, read where it fails."""
        self.store, self.copies = store, copies

    def wait(self, timeout_s: float) -> bool:
        """Whether all records that are needed are on this machine within that time."""
        return not isinstance(self.store, CachedStore) or self.store.wait(timeout_s)

    def has(self, keys: Collection[ExpertKey]) -> bool:
        """Whether these records are on this machine now."""
        return all(map(self.store.holds, keys))

    def hold(self, keys: Collection[ExpertKey]) -> None:
        """Keep these records on this machine too, for others that may be lost; returns at once.

        Raises CacheTooSmall, CacheDiskFull, CacheUnusable or UnknownExpert, and then nothing has changed.
        """
        if isinstance(self.store, CachedStore):
            self.store.need(keys)

    def free_bytes(self) -> int | None:
        """For records that are not here yet; None where the store is in place. Raises CacheUnusable."""
        return self.store.free_bytes() if isinstance(self.store, CachedStore) else None

    def use(self, source: StoreSource, secret: bytes) -> None:
        """Fetch from there from now on; folders that were copied from are left out."""
        if isinstance(self.store, CachedStore):
            self.store.use_sources(list_sources(source, (), secret))

    def status(self) -> dict[str, Any]:
        """Plain values: where the records are, and how many are there."""
        if isinstance(self.store, CachedStore):
            return {"folder": str(self.store.root), "is_cache": True} | self.store.progress().as_json()
        return {"folder": str(self.store.root), "is_cache": False}

    def close(self) -> None:
        self.store.close()


def open_near(
    source: StoreSource,
    keys: Collection[ExpertKey],
    cache: CacheSpec | None,
    secret: bytes,
    is_remote: Callable[[Path], bool] = is_on_network,
) -> NearStore:
    """The store with these records, there or on their way.

    Raises WeightsUnavailable, CacheTooSmall, CacheDiskFull or CacheUnusable.
    """
    others, reasons = [], []
    paths = [Path(path) for path in source.paths]
    for path in paths:
        if cache is not None and is_remote(path):
            others.append(path)
            continue
        try:
            store = _open_whole(path, source.store_hash, keys)
        except StoreDamaged as error:
            reasons.append(str(error))
        except ExpertCorrupt as error:  # the store is there, but not these of its records
            reasons.append(str(error))
            others.append(path)
        else:
            return NearStore(store, _copies(store, [other for other in paths if other != path]))
    if cache is None:
        advice = "; give every machine the store, or a --store-cache"
        raise WeightsUnavailable(f"store {source.store_hash[:12]}", "; ".join(reasons) + advice)
    folder = StoreCache(Path(cache.folder), cache.limit_bytes)
    return NearStore(CachedStore.join(folder, source.store_hash, list_sources(source, others, secret), keys))


def list_sources(source: StoreSource, folders: Sequence[Path], secret: bytes) -> list[WeightSource]:
    """folders: those of `paths` that are copied from."""
    servers = [(*peer, False) for peer in source.peers]
    if source.head is not None:
        servers.append((*source.head, True))
    listed: list[WeightSource] = [FolderSource(path, source.store_hash) for path in folders]
    listed += [
        ServerSource(host, port, secret=secret, store_hash=source.store_hash, is_origin=is_origin)
        for host, port, is_origin in servers
    ]
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


def _copies(store: ExpertStore, paths: Sequence[Path]) -> tuple[Path, ...]:
    """Those of the folders that hold the store too. What another machine has there, or has not, is no error."""
    copies = []
    for path in paths:
        with suppress(StoreDamaged):
            check_copies(store, (path,))
            copies.append(path)
    return tuple(copies)
