"""Reads a model's small text files, which come from outside, with limits."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from gateway.errors import ModelFileInvalid


def read_small_file(path: Path, max_bytes: int) -> bytes | None:
    """Content of a regular file, None when there is none. Raises ModelFileInvalid for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileInvalid(path.name, f"cannot be opened: {error.strerror}") from error
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ModelFileInvalid(path.name, "not a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ModelFileInvalid(path.name, f"larger than {max_bytes} bytes")
    return content


def read_small_json(path: Path, max_bytes: int) -> dict[str, object] | None:
    """A JSON object from a file, None when there is none. Raises ModelFileInvalid."""
    content = read_small_file(path, max_bytes)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFileInvalid(path.name, "not valid JSON") from error
    if not isinstance(value, dict):
        raise ModelFileInvalid(path.name, "not a JSON object")
    return value
