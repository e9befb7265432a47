"""A folder that appears under its final name whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from extraction.errors import DestinationOccupied, DiskFull, PathRefused


@contextmanager
def atomic_folder(dest: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `dest`; synced and renamed to `dest` when the block ends well, else removed.

    Raises DestinationOccupied, DiskFull (before the block, or for a write in it), or PathRefused.
    """
    if os.path.lexists(dest):
        raise DestinationOccupied(str(dest))
    parent = dest.absolute().parent
    root: Path | None = None
    free = 0
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = free_bytes(parent)
        if free < needed_bytes:
            raise DiskFull(str(parent), needed_bytes, free)
        root = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".partial", dir=parent))
        root.chmod(0o755)
        yield root
        _sync_tree(root)
        if os.path.lexists(dest):
            raise DestinationOccupied(str(dest))
        os.rename(root, dest)
        _sync_folder(parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # What was free when the work began: others may have filled the disk since.
            raise DiskFull(str(parent), needed_bytes, min(free, needed_bytes - 1)) from error
        raise PathRefused(str(error.filename or dest), error.strerror or str(error)) from error
    finally:
        if root is not None and root.exists():
            shutil.rmtree(root, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


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
