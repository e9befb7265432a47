"""Hashes of experts whose index has none, as they were at the first load. Used by `experts.store`.

One line an expert, appended to a file beside the index, so that later processes compare with the first one. Where
the folder cannot be written the hashes last as long as the process. Does not notice what changed before the first
load: only extraction that copies can.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from extraction.errors import CheckpointDamaged
from extraction.files import read_small_file
from extraction.manifest import ExpertKey

LOG_NAME = "first-load-hashes.txt"
MAX_LOG_BYTES = 64 * 1024 * 1024
_LINE = re.compile(r"(?P<component>[\w.-]+) (?P<layer>\d{1,6}) (?P<expert>\d{1,6}) (?P<sha256>[0-9a-f]{64})")

logger = logging.getLogger(__name__)


class HashLog:
    """Read when first needed; the first hash of an expert stands."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._hashes: dict[ExpertKey, str] | None = None

    def expect(self, key: ExpertKey, sha256: str) -> str:
        """The hash that was recorded for the expert; `sha256` itself, now recorded, when there was none."""
        if self._hashes is None:
            self._hashes = self._read()
        if key not in self._hashes:
            self._hashes[key] = sha256
            self._append(f"{key.component} {key.layer} {key.expert} {sha256}\n")
        return self._hashes[key]

    def _read(self) -> dict[ExpertKey, str]:
        try:
            text = read_small_file(self._root / LOG_NAME, MAX_LOG_BYTES).decode("ascii", "replace")
        except CheckpointDamaged:
            return {}
        hashes: dict[ExpertKey, str] = {}
        for line in text.splitlines():
            # A line that a crash cut short is no record.
            if match := _LINE.fullmatch(line):
                key = ExpertKey(match["component"], int(match["layer"]), int(match["expert"]))
                hashes.setdefault(key, match["sha256"])
        return hashes

    def _append(self, line: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self._root / LOG_NAME, flags, 0o644)
        except OSError as error:
            logger.debug("hashes of %s are not kept: %s", self._root, error.strerror)
            return
        try:
            # One short write with O_APPEND: lines of several processes do not mix.
            os.write(descriptor, line.encode())
        except OSError as error:
            logger.debug("hash not kept in %s: %s", self._root, error.strerror)
        finally:
            os.close(descriptor)
