"""Where the copying gets its shards from: a folder, or a hub from which they are fetched when their turn comes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from extraction.files import open_inside


class ShardSupply(Protocol):
    """Hands out shards, one after the other."""

    discards: bool
    """Whether released shards are gone, so that their bytes must be on the disk before."""

    @property
    def peak_bytes(self) -> int:
        """Most that shards take of the workspace's disk at a time."""

    def use(self, workspace: Path) -> None:
        """Called once, before the first shard: a folder for what is needed until the store is done, also by another
        run."""

    def identity(self, shards: Iterable[str]) -> str:
        """Another one means other bytes: what was copied before is of no use then."""

    def opened(self, shard: str) -> AbstractContextManager[int]:
        """A descriptor to read from. Raises an ExtractionError."""

    def release(self, shard: str) -> None:
        """The shard's bytes are all in the store, and on the disk."""


class FolderShards:
    """The shards of a checkpoint folder, which are left as they are."""

    discards = False
    peak_bytes = 0

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def use(self, workspace: Path) -> None:
        """Nothing is needed."""

    def identity(self, shards: Iterable[str]) -> str:
        """Of path, size and time of each shard. Raises CheckpointDamaged or PathRefused."""
        facts = [str(self._folder.resolve())]
        for shard in sorted(shards):
            with self.opened(shard) as descriptor:
                stat = os.fstat(descriptor)
            facts.append(f"{shard}\0{stat.st_size}\0{stat.st_mtime_ns}")
        return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()

    @contextmanager
    def opened(self, shard: str) -> Iterator[int]:
        """See ShardSupply."""
        descriptor = open_inside(self._folder, shard)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def release(self, shard: str) -> None:
        """Other people's files stay."""
