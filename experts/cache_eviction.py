"""Which records leave a node's store cache, and whether what its groups need fits at all. Pure.

Called by `experts.store_cache` when a group is registered; afterwards nothing has to leave until the next one is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CachedRecord:
    """A record's file."""

    store_hash: str
    stem: str
    """Which expert, as files are named; unique in its store."""
    nbytes: int
    used_at_ns: int
    """When a group last asked for it, or else when it came."""
    file: str
    """Its name in the store's folder of records."""

    @property
    def owner(self) -> tuple[str, str]:
        return self.store_hash, self.stem


@dataclass(frozen=True)
class CachePlan:
    """What is to happen before a group's records are fetched."""

    evict: tuple[CachedRecord, ...]
    missing_bytes: int
    """What the groups of this node still have to fetch."""
    needed_bytes: int
    """Of all their records together."""
    fits: bool
    """Whether that is within the limit. Where it is not, nothing is evicted."""


def plan_cache(
    records: Collection[CachedRecord],
    needed: Mapping[tuple[str, str], int],
    limit_bytes: int | None,
    free_bytes: int | None = None,
) -> CachePlan:
    """needed: bytes by owner, of every group that some live process of this node has.

    limit_bytes: of all records; None means no limit. free_bytes: of the disk; where what is missing is more, records
    that nobody needs make room for it as well. The oldest go first, and no more than needed.
    """
    there = {record.owner for record in records if record.nbytes == needed.get(record.owner)}
    needed_bytes = sum(needed.values())
    missing_bytes = sum(nbytes for owner, nbytes in needed.items() if owner not in there)
    if limit_bytes is not None and needed_bytes > limit_bytes:
        return CachePlan((), missing_bytes, needed_bytes, fits=False)
    held_bytes = sum(record.nbytes for record in records)
    surplus = 0 if limit_bytes is None else held_bytes + missing_bytes - limit_bytes
    if free_bytes is not None:
        surplus = max(surplus, missing_bytes - free_bytes)
    evict = []
    for record in sorted(records, key=lambda record: (record.used_at_ns, record.owner)):
        if surplus <= 0:
            break
        if record.owner not in needed:
            evict.append(record)
            surplus -= record.nbytes
    return CachePlan(tuple(evict), missing_bytes, needed_bytes, fits=True)
