"""Opening files that somebody else prepared: regular files only, inside their folder, never following a link out."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from extraction.errors import CheckpointDamaged, PathRefused


def open_inside(root: Path, relative: str) -> int:
    """A read-only descriptor of a regular file below `root`.

    Links are followed only while they stay inside `root`, or inside the `blobs` folder of a hub cache
    (`snapshots/REVISION/file -> ../../blobs/HASH`). Raises PathRefused or CheckpointDamaged.
    """
    try:
        resolved_root = root.resolve()
        target = (resolved_root / relative).resolve(strict=True)
    except FileNotFoundError as error:
        raise CheckpointDamaged(relative, "is missing") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise PathRefused(relative, "cannot be resolved") from error
    if not any(target.is_relative_to(folder) for folder in _allowed_folders(resolved_root)):
        raise PathRefused(relative, f"leads out of {resolved_root}")
    return open_regular(target)


def open_regular(path: Path) -> int:
    """A read-only descriptor of `path` itself, which must be a regular file and no link."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer before it can be refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointDamaged(path.name, "is missing") from error
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
        raise PathRefused(path.name, reason) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PathRefused(path.name, "is not a regular file")
    return descriptor


def read_small_file(root: Path, relative: str, max_bytes: int) -> bytes:
    """The whole content of a file below `root`.

    Raises PathRefused when it is no regular file there or larger than `max_bytes`, CheckpointDamaged when missing.
    """
    descriptor = open_inside(root, relative)
    try:
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise PathRefused(relative, f"cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise PathRefused(relative, f"is larger than {max_bytes} bytes")
    return content


def _allowed_folders(root: Path) -> list[Path]:
    is_hub_cache = root.parent.name == "snapshots"
    return [root, root.parent.parent / "blobs"] if is_hub_cache else [root]
