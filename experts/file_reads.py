"""Reads from an open file into memory that is there already: through the page cache, or past it in whole blocks.

Used by `experts.weight_files` and `experts.cached_store`, which say what a failed read means.
"""

from __future__ import annotations

import errno
import os

from torch import Tensor

BLOCK_BYTES = 4096
"""Reads past the page cache are whole blocks of the file into memory that begins at such a block."""


def fill(descriptor: int, offset: int, target: memoryview) -> bool:
    """Fill `target` from the file. False when the file ends before. Raises OSError."""
    while target:
        count = os.preadv(descriptor, [target], offset)
        if count == 0:
            return False
        target, offset = target[count:], offset + count
    return True


def fill_blocks(descriptor: int, start: int, nbytes: int, window: Tensor) -> bool:
    """Fill the window's first `nbytes` past the page cache. False where it cannot be done that way.

    descriptor: opened with O_DIRECT. window: uint8, aligned to BLOCK_BYTES, and with room for the last whole block.
    Raises OSError.
    """
    target = window.numpy().data[: -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES]
    done = 0
    while done < nbytes and done % BLOCK_BYTES == 0:
        try:
            count = os.preadv(descriptor, [target[done:]], start + done)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
        if count == 0:
            return False
        done += count
    return done >= nbytes


def reopen_direct(descriptor: int) -> int | None:
    """A descriptor of the same open file, whatever its name leads to by now, that passes the page cache by; None where
    the file system refuses that."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
