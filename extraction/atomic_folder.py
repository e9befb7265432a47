"""A folder that appears under its final name whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from extraction.errors import DestinationOccupied, DiskFull, PathRefused
from extraction.interrupts import signals_as_exit, uninterrupted

_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def atomic_folder(dest: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `dest`; synced and renamed to `dest` when the block ends well, else removed.

    Missing parents are made, and removed again on failure. SIGINT, SIGTERM and SIGHUP count as failures. What a killed
    run left for the same name is removed first.
    Raises DestinationOccupied, DiskFull (before the block, or for a write in it), or PathRefused.
    """
    check_vacant(dest)
    parent = dest.absolute().parent
    root = parent / f"{_prefix(dest)}{secrets.token_hex(4)}.partial"
    made: list[Path] = []
    lock = -1
    with signals_as_exit():
        try:
            _make_parents(parent, made)
            _remove_abandoned(parent, _prefix(dest))
            free = free_bytes(parent)
            if free < needed_bytes:
                raise DiskFull(str(parent), needed_bytes, free)
            lock = _make_locked(root)
            yield root
            _sync_tree(root)
            _rename(root, dest)
            made.clear()
            _sync_folder(parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(parent, root, needed_bytes) from error
            blamed = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else dest
            path = dest if blamed.is_relative_to(root) else blamed
            raise PathRefused(str(path), error.strerror or str(error)) from error
        finally:
            with uninterrupted():
                shutil.rmtree(root, ignore_errors=True)
                if lock >= 0:
                    os.close(lock)
                for folder in reversed(made):
                    with suppress(OSError):
                        folder.rmdir()


def check_vacant(dest: Path) -> None:
    """Raises DestinationOccupied, or PathRefused for what can be no folder's name."""
    if dest.name in ("", ".."):
        raise DestinationOccupied(str(dest))
    try:
        os.lstat(dest)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise PathRefused(str(dest), reason or "is no path") from error
    raise DestinationOccupied(str(dest))


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _prefix(dest: Path) -> str:
    """Hidden; shortened so that the whole name stays below the 255 bytes that file systems allow."""
    return f".{dest.name[:40]}."


def _disk_full(parent: Path, root: Path, needed_bytes: int) -> DiskFull:
    """What was free for us: what is still free and what we took. Others may have filled the disk since we looked."""
    taken = sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))
    available = free_bytes(parent) + taken if parent.is_dir() else 0
    return DiskFull(str(parent), needed_bytes, min(available, needed_bytes - 1))


def _make_parents(parent: Path, made: list[Path]) -> None:
    for folder in reversed([folder for folder in (parent, *parent.parents) if not os.path.lexists(folder)]):
        with suppress(FileExistsError):
            folder.mkdir()
            made.append(folder)
    parent.mkdir(exist_ok=True)


def _make_locked(root: Path) -> int:
    """Make the folder and lock it: as long as the lock is held, it is not abandoned. Returns the descriptor."""
    while True:
        root.mkdir()
        with suppress(FileNotFoundError):
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):  # Some network file systems have no locks.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if root.exists():
                return descriptor
            os.close(descriptor)
        # Another run took it for abandoned before it was locked.


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the temporary folders whose makers were killed: nobody holds their locks."""
    pattern = re.compile(re.escape(prefix) + r"[0-9a-f]{8}\.partial")
    for folder in [Path(entry) for entry in os.scandir(parent) if pattern.fullmatch(entry.name)]:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _rename(root: Path, dest: Path) -> None:
    check_vacant(dest)
    try:
        os.rename(root, dest)
    except OSError as error:
        if error.errno in _OCCUPIED:
            raise DestinationOccupied(str(dest)) from error
        raise


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder, name), os.O_RDONLY)
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
