"""Counts which experts an engine's requests ask for, wherever these are computed.

Costs one small NumPy operation a layer and step. The autoscaler hears of it (`cluster.ray_directory` carries it).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from router.dispatch import Dispatch
from router.scoring import Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner

Use = dict[tuple[str, int], npt.NDArray[np.int64]]
"""(component, layer) -> (E,) rows that each expert was asked for."""


class ExpertUse(RoutingWatcher):
    """A `RoutingWatcher` of one engine. Any thread may take."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._use: Use = {}

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        """See RoutingWatcher.watch."""
        call = dispatched.call
        layer = (call.component, call.layer)
        with self._lock:
            counts_E = self._use.get(layer)
            if counts_E is None:
                counts_E = self._use[layer] = np.zeros(gate.logits_TE.shape[1], np.int64)
            counts_E[list(call.experts)] += call.counts  # each expert is there once

    def take(self) -> Use:
        """What was counted since the last taking."""
        with self._lock:
            use, self._use = self._use, {}
        return use
