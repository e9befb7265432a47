"""Reads the small text files that a user names: keys and configuration. A pipe or device is refused, not waited for."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from gateway.errors import FileUnusable


@dataclass(frozen=True)
class TextFile:
    """What a file holds. `is_private`: only its owner, and perhaps a group, may read or change it."""

    text: str
    is_private: bool


def read_text_file(path: str, max_bytes: int) -> TextFile:
    """Raises FileUnusable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such path"
        raise FileUnusable(path, f"cannot be read: {reason}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise FileUnusable(path, "is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise FileUnusable(path, f"is larger than {max_bytes} bytes")
    try:
        return TextFile(content.decode("utf-8-sig"), not mode & stat.S_IRWXO)
    except UnicodeDecodeError as error:
        raise FileUnusable(path, f"is not UTF-8 at byte {error.start}") from error
