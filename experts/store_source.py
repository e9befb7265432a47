"""Where a machine finds a store, and where it keeps what came from elsewhere. Plain values.

Made by `gateway.service.launch` and the supervisor, carried out by `experts.near_store`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StoreSource:
    """Where a machine finds a store, in the order in which it looks."""

    store_hash: str
    paths: tuple[str, ...] = ()
    """Folders that may hold it here: on a disk of this machine, in which case it is used there, or on a shared one."""
    peers: tuple[tuple[str, int], ...] = ()
    """Host and port of machines that have some of its records."""
    head: tuple[str, int] | None = None
    """Host and port of who reads the whole store."""


STORE_CACHE_VARIABLE = "SAGE_MOE_STORE_CACHE"
"""Of a node's processes: that machine's own folder for copies of expert records, which goes before the service's."""


@dataclass(frozen=True)
class CacheSpec:
    """The folder on every machine that keeps what came from elsewhere."""

    folder: str
    limit_bytes: int | None = None

    def here(self, environment: Mapping[str, str] = os.environ) -> CacheSpec:
        """As this machine has it."""
        return replace(self, folder=environment.get(STORE_CACHE_VARIABLE) or self.folder)
