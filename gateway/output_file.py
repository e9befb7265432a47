"""Files that a command leaves where the user said: whole under their name, or not there. Called by the commands."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from gateway.errors import FileUnusable


def check_output(path: Path) -> None:
    """Told before the work, not after it. Raises FileUnusable where the file could not be made."""
    if path.is_dir():
        raise FileUnusable(str(path), "is a folder")
    if path.exists() and not path.is_file():  # a file would take its place
        raise FileUnusable(str(path), "is a device or a pipe, not a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise FileUnusable(str(path), f"cannot be written: {path.parent} is no folder to write to")


def write_output(path: Path, content: bytes) -> None:
    """Takes the place of a file of that name. Raises FileUnusable."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise FileUnusable(str(path), f"cannot be written: {error.strerror or error}") from error


def prepare_folder(path: Path) -> None:
    """Make the folder, readable by its owner only, where it is not there. Raises FileUnusable."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FileUnusable(str(path), f"cannot be made: {error.strerror or error}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise FileUnusable(str(path), "cannot be written to")
