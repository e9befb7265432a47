"""Hashes of weights whose store has none, as they were at the first load. Used by `experts.store`.

One line an expert or backbone tensor, appended to a file beside the index, so that later processes compare with the
first one. Where the folder cannot be written the hashes last as long as the process. Does not notice what changed
before the first load: only extraction that copies can. Safe for several threads and processes.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from pathlib import Path

from experts.errors import StoreDamaged
from extraction.errors import CheckpointDamaged, ExtractionError
from extraction.files import read_small_file

LOG_NAME = "first-load-hashes.txt"
MAX_LOG_BYTES = 64 * 1024 * 1024
_LINE = re.compile(r"(?P<owner>[\w.-]+( [\w.-]+){1,2}) (?P<sha256>[0-9a-f]{64})", re.ASCII)

logger = logging.getLogger(__name__)


class HashLog:
    """Read when first needed; the first hash of an owner stands."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._hashes: dict[str, str] | None = None
        self._lock = threading.Lock()

    def expect(self, owner: str, sha256: str) -> str:
        """The hash that was recorded for the owner; `sha256` itself, now recorded, when there was none.

        owner: "COMPONENT LAYER EXPERT" or "COMPONENT TENSOR". Raises StoreDamaged when the log cannot be trusted.
        """
        with self._lock:
            if self._hashes is None:
                self._hashes = self._read()
            if owner not in self._hashes:
                self._hashes[owner] = sha256
                self._append(f"{owner} {sha256}")
            return self._hashes[owner]

    def _read(self) -> dict[str, str]:
        try:
            text = read_small_file(self._root, LOG_NAME, MAX_LOG_BYTES).decode("ascii", "replace")
        except CheckpointDamaged:
            return {}
        except ExtractionError as error:
            raise StoreDamaged(str(self._root), str(error)) from error
        hashes: dict[str, str] = {}
        for line in text.split("\n"):
            # A line that a crash cut short is no record.
            if match := _LINE.fullmatch(line):
                hashes.setdefault(match["owner"], match["sha256"])
        return hashes

    def _append(self, line: str) -> None:
        if not _LINE.fullmatch(line):
            return  # No extraction writes such names; nobody could read the line.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self._root / LOG_NAME, flags, 0o644)
        except OSError as error:
            logger.debug("hashes of %s are not kept: %s", self._root, error.strerror)
            return
        try:
            size = os.fstat(descriptor).st_size
            is_cut_short = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            # One short write with O_APPEND: lines of several processes do not mix.
            os.write(descriptor, f"{chr(10) * is_cut_short}{line}\n".encode())
        except OSError as error:
            logger.debug("hash not kept in %s: %s", self._root, error.strerror)
        finally:
            os.close(descriptor)
