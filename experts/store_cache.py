"""A node's folder of records that came from elsewhere, shared by its processes.

```
DIR/lock                       held while records are registered or evicted
DIR/holders/TOKEN              which records a process needs; locked for as long as that process lives
DIR/stores/HASH/               a store's description, byte for byte
DIR/stores/HASH/records/       one file an expert: COMPONENT-LAYER-EXPERT-SHA256, the first a number
```

A record gets its name when all its bytes are on the disk and have the hash that the name says: a kill at any point
leaves at most a file of another name, which the next process removes. Evicts what no living process needs, oldest
first, when a group is registered and not later. Knows nothing of networks. Used by `experts.cached_store`.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from experts.cache_eviction import CachedRecord, plan_cache
from experts.errors import CacheDiskFull, CacheTooSmall, CacheUnusable
from extraction.manifest import SHA256_PATTERN

LOCK_TIMEOUT_S = 60.0
"""Registering a group takes a directory scan and some unlinks; whoever holds the lock longer is stuck."""
MAX_HOLDER_BYTES = 256 * 1024 * 1024
_RECORD = re.compile(
    rf"(?P<stem>[0-9]{{1,6}}-[0-9]{{5,10}}-[0-9]{{5,10}})-(?P<sha256>{SHA256_PATTERN})", re.ASCII
)
_PARTIAL = re.compile(r"\.(?P<token>[0-9a-f]{16})\.[0-9]+\.partial", re.ASCII)
_TOKEN = re.compile(r"[0-9a-f]{16}", re.ASCII)


def record_stem(component_number: int, layer: int, expert: int) -> str:
    """component_number: its place in the manifest, since a component's name may be too long for a file's."""
    return f"{component_number}-{layer:05}-{expert:05}"


class StoreCache:
    """One process's part in a cache: what it needs stays until `close`, or until the process ends."""

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        """Makes the folder where it is not there. limit_bytes: of all records. Raises CacheUnusable."""
        self.root, self.limit_bytes = root, limit_bytes
        self._token = secrets.token_hex(8)
        self._needs: dict[tuple[str, str], int] = {}
        self._numbers = itertools.count()
        with self._translated():
            for folder in (root, self._holders, root / "stores"):
                folder.mkdir(mode=0o700, parents=folder is root, exist_ok=True)
            with self._locked():
                self._own = os.open(self._holders / self._token, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._own, fcntl.LOCK_EX)

    def folder(self, store_hash: str) -> Path:
        """Of one store; opens as an `ExpertStore` once it is described, but holds no weights under their names."""
        return self.root / "stores" / store_hash

    def describe(self, store_hash: str, files: Mapping[str, bytes]) -> None:
        """Write a store's description: file by file, each whole or not at all; the last given comes last.

        Raises CacheUnusable or CacheDiskFull.
        """
        folder = self.folder(store_hash)
        with self._translated(sum(map(len, files.values()))):
            (folder / "records").mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = folder / "records" / self._partial_name()
                try:
                    with partial.open("xb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                    partial.replace(target)
                finally:
                    partial.unlink(missing_ok=True)

    def need(self, store_hash: str, records: Mapping[str, int]) -> None:
        """Keep these records, by stem with their bytes, beside those that this process needs already.

        Makes room for what of them is missing. Raises CacheTooSmall or CacheDiskFull, and then nothing has changed, or
        CacheUnusable.
        """
        added = {(store_hash, stem): nbytes for stem, nbytes in records.items()}
        with self._translated(), self._locked():
            tokens, others = self._living()
            self._remove_partial(tokens)
            wanted = self._needs | added
            held = list(self._scan())
            free = shutil.disk_usage(self.root).free
            plan = plan_cache(held, others | wanted, self.limit_bytes, free)
            if not plan.fits:
                assert self.limit_bytes is not None
                raise CacheTooSmall(str(self.root), self.limit_bytes, plan.needed_bytes)
            if plan.missing_bytes > free + sum(record.nbytes for record in plan.evict):
                raise CacheDiskFull(str(self.root), plan.missing_bytes, free)
            self._write_needs(wanted)
            for record in plan.evict:
                self._path(record).unlink(missing_ok=True)
            for record in held:
                if record.owner in added:
                    with suppress(OSError):  # another user's file may be read, and not be touched
                        os.utime(self._path(record))

    def held(self, store_hash: str) -> dict[str, tuple[Path, int]]:
        """Files of the records that are there and their sizes, by stem. Raises CacheUnusable."""
        with self._translated():
            records = self._scan_store(store_hash)
            return {record.stem: (self._path(record), record.nbytes) for record in records}

    def free_bytes(self) -> int:
        """For further records: of the disk, and within the limit. What nobody needs is not counted as free, though it
        would make room. Raises CacheUnusable."""
        with self._translated():
            free = shutil.disk_usage(self.root).free
            if self.limit_bytes is None:
                return free
            return max(0, min(free, self.limit_bytes - sum(record.nbytes for record in self._scan())))

    def keep(
        self, store_hash: str, stem: str, nbytes: int, write: Callable[[Callable[[memoryview], object]], str]
    ) -> Path:
        """Write one record. write: gets a sink for its bytes and returns their SHA-256 in hex, which it has compared.

        Returns the file. Raises CacheDiskFull, CacheUnusable, or what `write` raises; nothing is left then.
        """
        records = self.folder(store_hash) / "records"
        partial = records / self._partial_name()
        with self._translated(nbytes):
            try:
                with partial.open("xb", buffering=0) as file:
                    sha256 = write(lambda piece: _write_all(file.fileno(), piece))
                    os.fdatasync(file.fileno())
                final = records / f"{stem}-{sha256}"
                partial.rename(final)
            finally:
                partial.unlink(missing_ok=True)
        return final

    def discard(self, path: Path) -> None:
        """Remove a record whose bytes are not what its name says."""
        with suppress(OSError):
            path.unlink()

    def close(self) -> None:
        """What was needed may leave from now on."""
        with suppress(OSError):
            (self._holders / self._token).unlink()
        os.close(self._own)

    @property
    def _holders(self) -> Path:
        return self.root / "holders"

    def _path(self, record: CachedRecord) -> Path:
        return self.folder(record.store_hash) / "records" / record.file

    def _partial_name(self) -> str:
        return f".{self._token}.{next(self._numbers)}.partial"

    def _scan(self) -> Iterator[CachedRecord]:
        for store in os.scandir(self.root / "stores"):
            if re.fullmatch(SHA256_PATTERN, store.name):
                yield from self._scan_store(store.name)

    def _scan_store(self, store_hash: str) -> Iterator[CachedRecord]:
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder(store_hash) / "records"):
                match = _RECORD.fullmatch(entry.name)
                if match is None or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(FileNotFoundError):  # another process has just evicted it
                    stat = entry.stat(follow_symlinks=False)
                    yield CachedRecord(store_hash, match["stem"], stat.st_size, stat.st_mtime_ns, entry.name)

    def _living(self) -> tuple[set[str], dict[tuple[str, str], int]]:
        """Tokens of processes that live, and what the others of them need. The dead ones' files are removed."""
        tokens, needed = {self._token}, {}
        for entry in os.scandir(self._holders):
            if entry.name == self._token or not _TOKEN.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with os.fdopen(descriptor, "rb") as file:
                    if _is_locked(descriptor):
                        tokens.add(entry.name)
                        needed.update(_parse_needs(file.read(MAX_HOLDER_BYTES)))
                    else:
                        os.unlink(entry.path)
        return tokens, needed

    def _remove_partial(self, tokens: set[str]) -> None:
        """What killed processes left unfinished."""
        for store in os.scandir(self.root / "stores"):
            with suppress(FileNotFoundError, NotADirectoryError):
                for entry in os.scandir(Path(store.path) / "records"):
                    match = _PARTIAL.fullmatch(entry.name)
                    if match is not None and match["token"] not in tokens:
                        os.unlink(entry.path)

    def _write_needs(self, needs: dict[tuple[str, str], int]) -> None:
        """Under the lock, so that nobody reads it by half; of a process that dies meanwhile nobody reads it at all."""
        stores: dict[str, dict[str, int]] = {}
        for (store_hash, stem), nbytes in needs.items():
            stores.setdefault(store_hash, {})[stem] = nbytes
        content = json.dumps(stores).encode()
        os.lseek(self._own, 0, os.SEEK_SET)
        os.ftruncate(self._own, 0)
        _write_all(self._own, memoryview(content))
        self._needs = needs

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline_s = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline_s:
                        reason = f"another process has held its lock for {LOCK_TIMEOUT_S:.0f} s"
                        raise CacheUnusable(str(self.root), reason) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _translated(self, needed_bytes: int = 0) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                free = shutil.disk_usage(self.root).free
                raise CacheDiskFull(
                    str(self.root), needed_bytes, min(free, max(0, needed_bytes - 1))
                ) from error
            reason = error.strerror or str(error)
            named = f"{error.filename}: {reason}" if error.filename else reason
            raise CacheUnusable(str(self.root), named) from error


def record_sha256(path: Path) -> str:
    """What a record's name says of its bytes."""
    return path.name[-64:]


def _is_locked(descriptor: int) -> bool:
    """Whether another open file holds the lock; this one gets it otherwise, until it is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _parse_needs(content: bytes) -> dict[tuple[str, str], int]:
    """Raises CacheUnusable: to take it for nothing would evict what somebody needs."""
    try:
        stores = json.loads(content or b"{}")
        return {
            (str(store_hash), str(stem)): int(nbytes)
            for store_hash, records in stores.items()
            for stem, nbytes in records.items()
        }
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CacheUnusable("holders", "a file there is not what this program writes") from error


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
