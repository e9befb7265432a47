"""Where a node gets records that it does not have: another folder, or somebody's weight server; and in which order.

Sources are tried in the order in which they are given: a shared folder, peers, the head. One that fails is left alone
for a while, one that gives wrong bytes for good. Whatever any of them gives is compared with the hash in the index; of
a record without one (an index over original shards) only an *origin* is believed, which reads the shards themselves.
Used by `experts.record_fetcher` and `experts.cached_store`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from experts.errors import ExpertCorrupt, RecordNotHeld, SourceFailed, SourceLied, StoreDamaged
from experts.store import ExpertStore
from experts.weight_client import Sink, WeightLink
from experts.weight_frames import PART_BYTES
from extraction.errors import ExtractionError
from extraction.files import read_small_file
from extraction.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    ExpertRecord,
    Manifest,
    parse_manifest,
)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
IDLE_LINK_S = 20.0
"""A connection that rested longer is opened anew: the other end may have closed it."""
MAX_DESCRIPTION_BYTES = 1 << 30
"""Of all files of a description; real ones are some tens of MB."""


class WeightSource(Protocol):
    """Gives one store's description and records. Safe for several threads."""

    @property
    def name(self) -> str: ...

    @property
    def is_origin(self) -> bool:
        """Whether it is believed about records whose index has no hash."""

    def description(self) -> dict[str, bytes]:
        """All files that a reader checks whole, the manifest last. Raises SourceFailed or SourceLied."""

    def fetch(self, record: ExpertRecord, sink: Sink) -> str:
        """The SHA-256 of the record, all of whose bytes the sink has got.

        Raises RecordNotHeld, SourceFailed, or SourceLied where the hash is not the index's.
        """

    def stop(self) -> None:
        """Ends what is under way, which then fails; from any thread. `close` follows when nothing is."""

    def close(self) -> None: ...


class FolderSource:
    """A store's folder that this machine can read: a shared disk, or part of the store."""

    is_origin = True

    def __init__(self, path: Path, store_hash: str) -> None:
        self._path, self._store_hash = path, store_hash
        self._opened: ExpertStore | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return str(self._path)

    def description(self) -> dict[str, bytes]:
        """See WeightSource.description."""
        store = self._open()
        try:
            files = {
                name: read_small_file(store.root, name, MAX_MANIFEST_BYTES) for name in store.manifest.files
            }
            return files | {MANIFEST_NAME: read_small_file(store.root, MANIFEST_NAME, MAX_MANIFEST_BYTES)}
        except ExtractionError as error:
            raise SourceFailed(self.name, str(error)) from error

    def fetch(self, record: ExpertRecord, sink: Sink) -> str:
        """See WeightSource.fetch."""
        store, digest = self._open(), hashlib.sha256()
        if not store.holds(record.key):
            raise RecordNotHeld(self.name, f"expert {tuple(record.key)}")
        try:
            for piece in store.chunks(record.key, PART_BYTES):
                digest.update(piece)
                sink(piece)
            store.check_digest(record.key, digest.hexdigest())
        except (ExpertCorrupt, StoreDamaged) as error:
            raise RecordNotHeld(self.name, f"expert {tuple(record.key)} as it should be: {error}") from error
        return digest.hexdigest()

    def stop(self) -> None:
        """See WeightSource.stop; a read is over soon."""

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()

    def _open(self) -> ExpertStore:
        with self._lock:
            if self._opened is None:
                try:
                    store = ExpertStore.open(self._path)
                except StoreDamaged as error:
                    raise SourceFailed(self.name, error.reason) from error
                if store.hash != self._store_hash:
                    store.close()
                    raise SourceFailed(self.name, "holds another store")
                self._opened = store
            return self._opened


class ServerSource:
    """A weight server; keeps connections that are not in use for the next question."""

    def __init__(self, host: str, port: int, *, secret: bytes, store_hash: str, is_origin: bool) -> None:
        self._host, self._port, self._secret, self._store_hash = host, port, secret, store_hash
        self._is_origin = is_origin
        self._idle: list[tuple[float, WeightLink]] = []
        self._busy: set[WeightLink] = set()
        self._is_stopped = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"{self._host}:{self._port}"

    @property
    def is_origin(self) -> bool:
        return self._is_origin

    def description(self) -> dict[str, bytes]:
        """See WeightSource.description."""
        with self._borrowed() as link:
            raw = link.manifest()
            files = {name: link.file(name, entry) for name, entry in _described(self.name, raw).files.items()}
        return files | {MANIFEST_NAME: raw}

    def fetch(self, record: ExpertRecord, sink: Sink) -> str:
        """See WeightSource.fetch."""
        what = f"expert {tuple(record.key)}"
        if record.sha256 is None and not self._is_origin:
            raise RecordNotHeld(self.name, f"{what} with a hash to compare it with")
        with self._borrowed() as link:
            digest = link.record(record.key, record.nbytes, sink)
        if record.sha256 not in (None, digest):
            raise SourceLied(self.name, f"gave other bytes than the store has for {what}")
        return digest

    def stop(self) -> None:
        """See WeightSource.stop."""
        with self._lock:
            self._is_stopped = True
            for link in self._busy:
                link.end()

    def close(self) -> None:
        with self._lock:
            while self._idle:
                self._idle.pop()[1].close()

    @contextmanager
    def _borrowed(self) -> Iterator[WeightLink]:
        """A connection that rested, or a new one; it rests again unless it broke."""
        link = self._rested() or self._connect()
        with self._lock:
            if self._is_stopped:
                link.close()
                raise SourceFailed(self.name, "no longer wanted")
            self._busy.add(link)
        is_good = False
        try:
            yield link
            is_good = True
        except RecordNotHeld:
            is_good = True
            raise
        finally:
            with self._lock:
                self._busy.discard(link)
                if is_good:
                    self._idle.append((time.monotonic(), link))
            if not is_good:
                link.close()

    def _rested(self) -> WeightLink | None:
        with self._lock:
            while self._idle:
                since_s, link = self._idle.pop()
                if time.monotonic() - since_s < IDLE_LINK_S:
                    return link
                link.close()
        return None

    def _connect(self) -> WeightLink:
        link = WeightLink(self._host, self._port, secret=self._secret)
        if link.announcement.store_hash != self._store_hash:
            link.close()
            raise SourceFailed(self.name, f"serves store {link.announcement.store_hash[:12]}, another one")
        return link


def _described(source: str, raw: bytes) -> Manifest:
    """Raises SourceFailed for a manifest whose files would take too much, or the place of others."""
    try:
        manifest = parse_manifest(raw)
    except ExtractionError as error:
        raise SourceFailed(source, str(error)) from error
    total_bytes = sum(entry.nbytes for entry in manifest.files.values())
    if total_bytes > MAX_DESCRIPTION_BYTES:
        raise SourceFailed(source, f"files of {total_bytes} bytes, at most {MAX_DESCRIPTION_BYTES}")
    return manifest


@dataclass
class _Standing:
    failures: int = 0
    retry_at_s: float = 0.0
    has_lied: bool = False
    last_error: str = ""


@dataclass
class SourceOrder:
    """Which sources are worth asking now. Pure but for its memory; several threads may use it under one lock."""

    num_sources: int
    _standings: list[_Standing] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._standings = [_Standing() for _ in range(self.num_sources)]

    def askable(self, now_s: float, *, is_urgent: bool = False) -> list[int]:
        """In the given order. Urgent: those that failed are asked again before their time, after the others."""
        honest = [index for index, standing in enumerate(self._standings) if not standing.has_lied]
        ready = [index for index in honest if self._standings[index].retry_at_s <= now_s]
        return ready + [index for index in honest if index not in ready] if is_urgent else ready

    def worked(self, index: int) -> None:
        standing = self._standings[index]
        standing.failures, standing.retry_at_s, standing.last_error = 0, 0.0, ""

    def failed(self, index: int, error: SourceFailed, now_s: float) -> None:
        standing = self._standings[index]
        standing.failures += 1
        standing.has_lied |= isinstance(error, SourceLied)
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(standing.failures - 1, 10))
        standing.retry_at_s, standing.last_error = now_s + pause_s, str(error)

    def retry_at_s(self) -> float | None:
        """When the first of those that failed may be asked again; None where all have lied."""
        times = [standing.retry_at_s for standing in self._standings if not standing.has_lied]
        return min(times, default=None)

    def reasons(self) -> str:
        """What went wrong last, for people."""
        reasons = [standing.last_error for standing in self._standings if standing.last_error]
        return "; ".join(reasons) or "no source has it"


def close_all(sources: Sequence[WeightSource]) -> None:
    for source in sources:
        with suppress(OSError):
            source.close()
