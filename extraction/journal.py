"""What an extraction has finished so far, kept beside its unfinished store for whoever continues after a kill.

A line is added, and synced, when a step is done. Its hashes are claims that the next run checks against the bytes, so a
journal that is ahead of the disk after a power failure costs time and nothing else. No part of the store's format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from extraction.errors import ExtractionError
from extraction.files import open_regular

JOURNAL_NAME = "journal"
MAX_JOURNAL_BYTES = 256 * 1024 * 1024


class Journal:
    """An open journal. `key` says of what: source, plan and options; another key's journal is no help."""

    def __init__(self, folder: Path, key: str) -> None:
        """Make it, or read what is there up to the first line that a kill cut short. Raises OSError."""
        path = folder / JOURNAL_NAME
        self._done, valid_bytes = _read(path, key)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        os.ftruncate(self._descriptor, valid_bytes)
        os.lseek(self._descriptor, valid_bytes, os.SEEK_SET)
        if not valid_bytes:
            self._append({"key": key})

    @property
    def done(self) -> Mapping[str, Mapping[str, str]]:
        """Digests of each finished step, by step."""
        return self._done

    def add(self, step: str, digests: Mapping[str, str]) -> None:
        """Returns when the line is on the disk."""
        self._append({"step": step, "digests": dict(digests)})
        self._done[step] = dict(digests)

    def close(self) -> None:
        os.close(self._descriptor)

    def _append(self, entry: dict[str, Any]) -> None:
        line = memoryview(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fdatasync(self._descriptor)


def is_journal_of(folder: Path, key: str) -> bool:
    """Whether the folder has a journal of this key."""
    return _read(folder / JOURNAL_NAME, key)[1] > 0


def _read(path: Path, key: str) -> tuple[dict[str, dict[str, str]], int]:
    """Finished steps, and how many bytes of the file are sound. Nothing where it is another key's."""
    done: dict[str, dict[str, str]] = {}
    position = 0
    for number, line in enumerate(_content(path).split(b"\n")[:-1]):
        entry = _parse(line)
        if number == 0:
            if entry != {"key": key}:
                break
        elif not _is_step(entry):
            break
        else:
            done[entry["step"]] = entry["digests"]
        position += len(line) + 1
    return done, position


def _content(path: Path) -> bytes:
    with suppress(ExtractionError, OSError), os.fdopen(open_regular(path), "rb") as file:
        return file.read(MAX_JOURNAL_BYTES)
    return b""


def _parse(line: bytes) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def _is_step(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), str):
        return False
    digests = entry.get("digests")
    return isinstance(digests, dict) and all(isinstance(value, str) for value in digests.values())
