"""The budget of one tier of experts, and what keeps to it: who is there, their buffers, and the shadows that follow.

Used by `experts.cache` for host memory and by `experts.device_tier` for a device's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experts.buffers import BufferPool
from experts.residency import Residency
from experts.shadow import ShadowCaches
from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class TierBooks:
    """All that goes by one number of bytes."""

    residency: Residency
    pool: BufferPool
    shadows: ShadowCaches | None
    planned_bytes: int | None
    """The budget of the beginning, and the most that it may be again; None for no bound."""
    largest_bytes: int
    """Of one expert; the least that a budget is."""

    def clamped(self, budget_bytes: int) -> int:
        """The budget that comes of asking for so many bytes. Raises ValueError where there is no bound, or none was
        needed: uses were then not counted."""
        if self.planned_bytes is None or self.residency.budget_bytes is None:
            raise ValueError("a cache without a bound cannot get one")
        return min(self.planned_bytes, max(budget_bytes, self.largest_bytes))

    def set_budget(self, budget_bytes: int, drop: Callable[[ExpertKey], None]) -> None:
        """Keep to a clamped budget from now on. drop: lets go of an expert that is too much, and of its buffer."""
        for key in self.residency.set_budget(budget_bytes):
            drop(key)
        self.pool.set_limit(budget_bytes)
        if self.shadows is not None:
            self.shadows.set_budget(budget_bytes)
