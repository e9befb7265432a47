"""Follows the capacity state, and says when processes are to keep another share of their experts.

Decides by `cluster.capacity`; who carries it out is the caller's.
Used by `gateway.service.router_replica`, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from cluster.capacity import Capacity, CapacityState, Load, ServiceSize, kept_share, observe


class CapacityWatch:
    """Begins at WAKE: a service that has just started was not idle for long."""

    def __init__(self, size: ServiceSize, resize: Callable[[Fraction], object] | None = None) -> None:
        """resize: told the share at the first look and whenever it changes; must not block. None means that the
        state is only shown."""
        self.size = size
        self._resize = resize
        self._capacity = Capacity("wake")
        self._share: Fraction | None = None

    @property
    def state(self) -> CapacityState:
        """As of the last look."""
        return self._capacity.state

    def look(self, load: Load, now_s: float) -> CapacityState:
        """The state with this load. now_s: of a monotonic clock."""
        self._capacity = observe(self._capacity, load, now_s)
        share = kept_share(self.state, self.size)
        if self._resize is not None and share != self._share:
            self._share = share
            self._resize(share)
        return self.state
