"""Brings a store's records into the node's cache: on demand first, the rest of the group beside that.

Owns the threads that fetch. A record counts as there when it bears its name in the cache, that is when all its bytes
were compared with their hash. Used by `experts.cached_store`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from experts.errors import ExpertError, RecordNotHeld, SourceFailed, WeightsUnavailable
from experts.fetch_queue import FetchQueue
from experts.store_cache import StoreCache, record_sha256
from experts.weight_sources import SourceOrder, WeightSource, close_all
from extraction.manifest import ExpertKey, ExpertRecord

logger = logging.getLogger(__name__)

FETCH_THREADS = 2
"""One hashes while the other waits for the network; SHA-256 of one core is about the rate of a 10 Gb/s link."""
RETRY_S = 5.0
"""Until a record that nobody gave is tried again, if nobody waits for it."""


@dataclass(frozen=True)
class FetchProgress:
    """How far a group is on this node's disk. Made for `status` and progress bars."""

    records_done: int
    records_total: int
    bytes_done: int
    bytes_total: int
    fetched_bytes: Mapping[str, int] = field(default_factory=dict)
    """By this process, by source."""
    last_error: str = ""

    @property
    def is_done(self) -> bool:
        return self.records_done == self.records_total

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"fetched_bytes": dict(self.fetched_bytes)}


class RecordFetcher:
    """Safe for several threads."""

    def __init__(
        self,
        cache: StoreCache,
        store_hash: str,
        records: Mapping[ExpertKey, ExpertRecord],
        stems: Mapping[ExpertKey, str],
        sources: Sequence[WeightSource],
    ) -> None:
        """records, stems: of the whole store. sources: belong to the fetcher from now on. Raises CacheUnusable."""
        self._cache, self._store_hash = cache, store_hash
        self._records, self._stems = records, stems
        self._sources, self._order = tuple(sources), SourceOrder(len(sources))
        self._retired: tuple[WeightSource, ...] = ()
        self._changed = threading.Condition()
        self._queue = FetchQueue()
        self._group: set[ExpertKey] = set()
        self._paths: dict[ExpertKey, Path] = {}
        self._waited: dict[ExpertKey, Future[Path]] = {}
        self._fetched_bytes: dict[str, int] = {}
        self._last_error = ""
        self._is_closing = False
        self.refresh()
        self._threads = [
            threading.Thread(target=self._run, name=f"weights-{number}", daemon=True)
            for number in range(FETCH_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def refresh(self) -> None:
        """Look which records are in the cache; other processes bring some too. Raises CacheUnusable."""
        with self._changed:
            before = frozenset(self._paths)
        files = self._cache.held(self._store_hash)
        paths = {}
        for key, record in self._records.items():
            path, nbytes = files.get(self._stems[key], (None, 0))
            if path is not None and nbytes == record.nbytes and record.sha256 in (None, record_sha256(path)):
                paths[key] = path
        with self._changed:  # what has come since the look is kept
            self._paths = paths | {key: path for key, path in self._paths.items() if key not in before}

    def held(self) -> frozenset[ExpertKey]:
        with self._changed:
            return frozenset(self._paths)

    def path_of(self, key: ExpertKey) -> Path | None:
        """The record's file, if it is there."""
        with self._changed:
            return self._paths.get(key)

    def want(self, keys: Collection[ExpertKey]) -> None:
        """Fetch these when nobody waits for anything else."""
        with self._changed:
            self._group.update(keys)
            self._queue.want(key for key in keys if key not in self._paths)
            self._changed.notify_all()

    def bring(self, key: ExpertKey) -> Path:
        """The record's file; waits until it is there. Raises WeightsUnavailable, CacheDiskFull or CacheUnusable."""
        with self._changed:
            path = self._paths.get(key)
            if path is not None:
                return path
            future = self._waited.get(key)
            if future is None:
                if self._is_closing:
                    raise WeightsUnavailable(f"expert {tuple(key)}", "the store is closed")
                future = self._waited[key] = Future()
                self._queue.urge(key)
                self._changed.notify()
        return future.result()

    def drop(self, key: ExpertKey, path: Path) -> None:
        """The file has gone, or holds other bytes than its name says: it is fetched again when it is needed."""
        self._cache.discard(path)
        with self._changed:
            if self._paths.get(key) == path:
                del self._paths[key]
            if key in self._group:
                self._queue.want([key])
                self._changed.notify()

    def use_sources(self, sources: Sequence[WeightSource]) -> None:
        """From now on; fetches under way end as they began."""
        with self._changed:
            self._retired += self._sources
            self._sources, self._order = tuple(sources), SourceOrder(len(sources))
            self._queue.pause(0.0)
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Whether all that is wanted is there within that time."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not (self._queue.is_idle or self._is_closing):
                rest_s = deadline_s - time.monotonic()
                if rest_s <= 0:
                    break
                self._changed.wait(rest_s)
            return self._queue.is_idle

    def progress(self) -> FetchProgress:
        with self._changed:
            done = self._group & self._paths.keys()
            return FetchProgress(
                len(done),
                len(self._group),
                sum(self._records[key].nbytes for key in done),
                sum(self._records[key].nbytes for key in self._group),
                dict(self._fetched_bytes),
                self._last_error,
            )

    def close(self) -> None:
        """Ends what is under way, and the threads; who waits for something gets WeightsUnavailable."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            sources = (*self._sources, *self._retired)
        for source in sources:
            source.stop()
        for thread in self._threads:
            thread.join()
        with self._changed:
            waited, self._waited = self._waited, {}
        for key, future in waited.items():
            future.set_exception(WeightsUnavailable(f"expert {tuple(key)}", "the store is closed"))
        close_all(sources)

    def _run(self) -> None:
        while (key := self._next()) is not None:
            error: ExpertError | None = None
            path: Path | None = None
            try:
                path = self._fetch(key)
            except ExpertError as failure:
                error = failure
            except (
                Exception
            ) as failure:  # a bug must not end the thread: somebody may wait for the next record
                logger.exception("fetching expert %s failed", tuple(key))
                error = WeightsUnavailable(f"expert {tuple(key)}", type(failure).__name__)
            self._settle(key, path, error)

    def _next(self) -> ExpertKey | None:
        """Waits for something to fetch. None: the fetcher closes."""
        with self._changed:
            while not self._is_closing:
                now_s = time.monotonic()
                key = self._queue.take(now_s)
                if key is not None:
                    return key
                self._changed.wait(self._queue.wait_s(now_s))
            return None

    def _fetch(self, key: ExpertKey) -> Path:
        record, stem = self._records[key], self._stems[key]
        with self._changed:
            sources, order = self._sources, self._order
            askable = order.askable(time.monotonic(), is_urgent=key in self._waited)
        reasons = []
        for index in askable:
            source = sources[index]
            try:
                path = self._cache.keep(self._store_hash, stem, record.nbytes, partial(source.fetch, record))
            except RecordNotHeld as absent:
                reasons.append(str(absent))
                continue
            except SourceFailed as failure:
                logger.warning("%s", failure)
                with self._changed:
                    order.failed(index, failure, time.monotonic())
                reasons.append(str(failure))
                continue
            with self._changed:
                order.worked(index)
                fetched = self._fetched_bytes.get(source.name, 0)
                self._fetched_bytes[source.name] = fetched + record.nbytes
            return path
        raise WeightsUnavailable(f"expert {tuple(key)}", "; ".join(reasons) or order.reasons())

    def _settle(self, key: ExpertKey, path: Path | None, error: ExpertError | None) -> None:
        with self._changed:
            if path is not None:
                self._paths[key] = path
                self._queue.done(key)
                self._last_error = ""
            else:
                self._last_error = str(error)
                self._put_back(key, error)
            future = self._waited.pop(key, None)
            self._changed.notify_all()
        if future is None:
            return
        if path is not None:
            future.set_result(path)
        else:
            assert error is not None
            future.set_exception(error)

    def _put_back(self, key: ExpertKey, error: ExpertError | None) -> None:
        """Try again later; where the reason of the failure concerns every record, none of them until then."""
        now_s = time.monotonic()
        retry_at_s = now_s + RETRY_S
        is_about_all = not isinstance(error, WeightsUnavailable)  # the disk, then
        if not self._order.askable(now_s):
            is_about_all, retry_at_s = True, self._order.retry_at_s() or retry_at_s
        self._queue.failed(key, retry_at_s)
        if is_about_all:
            self._queue.pause(retry_at_s)
