"""An image's or a sound's file on this machine, as a user names it. Imports nothing that is slow to import."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gateway.media.errors import MediumRefused


def read_media_file(path: str | Path, most_bytes: int) -> bytes:
    """Its content. Raises MediumRefused; never waits for somebody to write to a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise MediumRefused("is no regular file")
            content = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such path"
        raise MediumRefused(f"cannot be read: {reason}") from error
    if len(content) > most_bytes:
        raise MediumRefused(f"is larger than {most_bytes >> 20} MiB")
    return content
