"""A folder that appears under its final name whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from extraction.errors import DestinationOccupied, DiskFull, PathRefused
from extraction.interrupts import signals_as_exit, uninterrupted

_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def atomic_folder(
    dest: Path,
    needed_bytes: int,
    *,
    can_continue: Callable[[Path], bool] = lambda workspace: False,
    kept_on: tuple[type[BaseException], ...] = (),
) -> Iterator[Path]:
    """A folder that is synced and renamed to `dest` when the block ends well, else removed.

    It is called `store` and lies in a hidden workspace beside `dest`, its parent, where the block may keep what it
    needs to continue; the workspace goes away with it. A workspace that a killed run left is taken over, with all that
    is in it, when `can_continue` says so, and removed otherwise. Missing parents are made, and removed again on
    failure. SIGINT, SIGTERM and SIGHUP count as failures; after those of `kept_on` the workspace is left for the next
    run.
    Raises DestinationOccupied, DiskFull (before the block, or for a write in it), or PathRefused.
    """
    check_vacant(dest)
    parent = dest.absolute().parent
    workspace = parent / f"{_prefix(dest)}{secrets.token_hex(4)}.partial"
    made: list[Path] = []
    lock, is_kept = -1, False
    with signals_as_exit():
        try:
            _make_parents(parent, made)
            taken = _take_abandoned(parent, _prefix(dest), can_continue)
            if taken is not None:
                workspace, lock = taken
            free = free_bytes(parent) + _bytes_on_disk(workspace)
            if free < needed_bytes:
                raise DiskFull(str(parent), needed_bytes, free)
            if lock < 0:
                lock = _make_locked(workspace)
            root = workspace / "store"
            root.mkdir(exist_ok=True)
            yield root
            _sync_tree(root)
            _rename(root, dest)
            made.clear()
            _sync_folder(parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(parent, workspace, needed_bytes) from error
            blamed = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else dest
            path = dest if blamed.is_relative_to(workspace) else blamed
            raise PathRefused(str(path), error.strerror or str(error)) from error
        except kept_on:
            is_kept = True
            raise
        finally:
            with uninterrupted():
                if not is_kept:
                    shutil.rmtree(workspace, ignore_errors=True)
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


def reclaimable_bytes(dest: Path) -> int:
    """What runs that were killed left on the disk for this name: the next one uses or removes it."""
    folder = dest.absolute().parent
    if not folder.is_dir():
        return 0
    return sum(_bytes_on_disk(workspace) for workspace in _workspaces(folder, _prefix(dest)))


def _prefix(dest: Path) -> str:
    """Hidden; shortened so that the whole name stays below the 255 bytes that file systems allow."""
    return f".{dest.name[:40]}."


def _disk_full(parent: Path, workspace: Path, needed_bytes: int) -> DiskFull:
    """What was free for us: what is still free and what we took. Others may have filled the disk since we looked."""
    available = free_bytes(parent) + _bytes_on_disk(workspace) if parent.is_dir() else 0
    return DiskFull(str(parent), needed_bytes, min(available, needed_bytes - 1))


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


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


def _take_abandoned(
    parent: Path, prefix: str, can_continue: Callable[[Path], bool]
) -> tuple[Path, int] | None:
    """The first workspace that can be continued, and the descriptor that locks it. The others are removed.

    Abandoned are those whose makers were killed: nobody holds their locks.
    """
    taken: tuple[Path, int] | None = None
    for folder in _workspaces(parent, prefix):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            is_taken = False
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_taken = taken is None and folder.exists() and can_continue(folder)
                if is_taken:
                    taken = (folder, descriptor)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                if not is_taken:
                    os.close(descriptor)
    return taken


def _workspaces(parent: Path, prefix: str) -> list[Path]:
    pattern = re.compile(re.escape(prefix) + r"[0-9a-f]{8}\.partial")
    return [Path(entry) for entry in os.scandir(parent) if pattern.fullmatch(entry.name)]


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
