"""Counts which experts an engine's requests ask for, wherever these are computed.

Costs a few small NumPy operations a layer and step. The autoscaler hears of it (`cluster.ray_directory` carries it).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from router.dispatch import Dispatch
from router.scoring import ABSENT, Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner, View

Use = dict[tuple[str, int], npt.NDArray[np.int64]]
"""(component, layer) -> (E,) rows that each expert was asked for."""


class ExpertUse(RoutingWatcher):
    """A `RoutingWatcher` of one engine, which needs to see no layer's rows. Any thread may take."""

    def __init__(self, component: str, num_experts: int) -> None:
        self._component, self._num_experts = component, num_experts
        self._lock = threading.Lock()
        self._use: Use = {}

    def wanted(self, owners: Sequence[SpanOwner]) -> View:
        """See RoutingWatcher.wanted."""
        return View((), has_choices=True)

    def watch_choices(self, owners: Sequence[SpanOwner], layer: int, routing: Routing) -> None:
        """See RoutingWatcher.watch_choices."""
        chosen = routing.experts_TK.numpy().ravel()
        counts_E = np.bincount(chosen[chosen != ABSENT], minlength=self._num_experts)
        with self._lock:
            known_E = self._use.setdefault((self._component, layer), np.zeros(self._num_experts, np.int64))
            known_E += counts_E

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        """See RoutingWatcher.watch."""
        self.watch_choices(owners, gate.layer, routing)

    def take(self) -> Use:
        """What was counted since the last taking."""
        with self._lock:
            use, self._use = self._use, {}
        return use
