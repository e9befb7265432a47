"""`sage-moe store share` and `sage-moe store sync`: a store's records from one machine to the disks of others.

The work is in `experts.weight_server` and `experts.cached_store`; here are options, selection and patience.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experts.cached_store import CachedStore
from experts.errors import ExpertError, SourceFailed
from experts.record_fetcher import FetchProgress
from experts.store import ExpertStore
from experts.store_cache import StoreCache
from experts.weight_client import WeightLink
from experts.weight_server import WeightServer
from experts.weight_sources import FolderSource, ServerSource, WeightSource, close_all
from extraction.manifest import ExpertKey, GroupShare
from gateway.errors import AddressUnusable, OptionInvalid, SyncStopped
from gateway.service.bind_address import check_free, resolve_bind

PATIENCE_S = 30.0
"""Without a single record after an error: nobody will give any."""
LOOK_S = 0.1
_ADDRESS = re.compile(r"(?P<host>[^\s\[\]]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class SyncRequest:
    """What is wanted, and where it comes from."""

    folder: Path
    """The store cache to fill."""
    store: Path | None = None
    """A store's folder that this machine can read."""
    servers: tuple[tuple[str, int], ...] = ()
    secret: bytes = b""
    layers: frozenset[int] | None = None
    groups: GroupShare | None = None
    limit_bytes: int | None = None


@dataclass(frozen=True)
class SyncReport:
    """What is there afterwards."""

    folder: Path
    store_hash: str
    progress: FetchProgress


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`. Raises OptionInvalid."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise OptionInvalid("--from", f"must be HOST:PORT with a port from 1 to 65535, not {text[:80]!r}")
    return match["host"].strip("[]"), int(match["port"])


@contextmanager
def shared_store(root: Path, secret: bytes, host: str, port: int) -> Iterator[tuple[WeightServer, str]]:
    """The server that gives a store's records, and its address as `--from` takes it.

    port: 0 for any. Raises StoreDamaged, AddressUnusable or PortTaken.
    """
    address = resolve_bind(host, port)
    if address.is_v6:
        raise AddressUnusable(host, "weights are served at IPv4 addresses only")
    check_free(host, address)
    store = ExpertStore.open(root)
    try:
        store.check_places(store.expert_keys())
        server = WeightServer(store, secret=secret, host=address.address, port=address.port)
        server.start()
        try:
            yield server, f"{address.address}:{server.port}"
        finally:
            server.stop()
    finally:
        store.close()


def sync(
    request: SyncRequest, show: Callable[[int, int], None], patience_s: float = PATIENCE_S
) -> SyncReport:
    """Fetch what is missing; returns when all is there. show: called with records done and to do.

    Raises SyncStopped when nobody gives any more, OptionInvalid, WeightsUnavailable, CacheTooSmall, CacheDiskFull or
    CacheUnusable. What had come by then stays.
    """
    sources, store_hash = _sources(request)
    try:
        cache = StoreCache(request.folder, request.limit_bytes)
    except ExpertError:
        close_all(sources)
        raise
    store = CachedStore.join(cache, store_hash, sources, keys=())
    try:
        store.need(chosen_experts(store.expert_keys(), request))
        _await_all(store, show, patience_s)
        return SyncReport(store.root, store_hash, store.progress())
    finally:
        store.close()


def _await_all(store: CachedStore, show: Callable[[int, int], None], patience_s: float) -> None:
    done, changed_at_s = -1, time.monotonic()
    while True:
        is_done = store.wait(LOOK_S)
        progress = store.progress()
        if progress.records_done != done or not progress.last_error:
            done, changed_at_s = progress.records_done, time.monotonic()
            show(done, progress.records_total)
        if is_done:
            return
        if time.monotonic() - changed_at_s >= patience_s:
            raise SyncStopped(progress.last_error, done, progress.records_total)


def _sources(request: SyncRequest) -> tuple[list[WeightSource], str]:
    """And the store's hash: the folder's, else that of the first server that answers."""
    sources: list[WeightSource] = []
    store_hash = ""
    if request.store is not None:
        store = ExpertStore.open(request.store)
        store_hash = store.hash
        store.close()
        sources.append(FolderSource(request.store, store_hash))
    store_hash = store_hash or _announced(request.servers, request.secret)
    sources += [
        ServerSource(host, port, secret=request.secret, store_hash=store_hash, is_origin=True)
        for host, port in request.servers
    ]
    return sources, store_hash


def _announced(servers: Sequence[tuple[str, int]], secret: bytes) -> str:
    """Raises what the first server's failure is, where all fail."""
    first: SourceFailed | None = None
    for host, port in servers:
        try:
            link = WeightLink(host, port, secret=secret)
        except SourceFailed as error:
            first = first or error
            continue
        link.close()
        return link.announcement.store_hash
    assert first is not None, "a request names a store or a server"
    raise first


def chosen_experts(keys: Collection[ExpertKey], request: SyncRequest) -> tuple[ExpertKey, ...]:
    """Raises OptionInvalid where nothing is left."""
    layers = request.layers
    if layers is not None:
        unknown = sorted(layers - {key.layer for key in keys})
        if unknown:
            raise OptionInvalid("--layers", f"names layer {unknown[0]}, which has no experts")
    chosen = tuple(
        key
        for key in keys
        if (layers is None or key.layer in layers) and (request.groups is None or request.groups.holds(key))
    )
    if not chosen:
        raise OptionInvalid("--groups", "holds none of these experts")
    return chosen
