"""Routing from a trace in place of the gate's: `--replay-routing`.

Experts and mixing weights are those of the file, bit for bit, whatever policy they came from; a replayed native run
therefore has the bits of that run. Requests are matched by the order in which they are first computed. Called by the
engine as a `RoutingPolicy`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from router.errors import RoutingMissing, TraceInvalid
from router.model_config import ModelConfig
from router.scoring import Routing
from router.step_routing import GateOutput, SpanOwner
from router.trace_reader import RoutingTable

MAX_PLACES = 1 << 62
"""Requests times positions times layers: what a 64-bit key can tell apart."""


class ReplayPolicy:
    """A `RoutingPolicy` over one trace, for one run of one engine."""

    def __init__(self, table: RoutingTable, config: ModelConfig, path: str) -> None:
        """Raises TraceInvalid where the trace is of another model's shape, or has rows of several lengths."""
        facts = table.facts
        if (facts.num_layers, facts.num_experts) != (config.num_layers, config.num_experts):
            raise TraceInvalid(
                path,
                f"is of a model with {facts.num_layers} layers of {facts.num_experts} experts; "
                f"this one has {config.num_layers} of {config.num_experts}",
            )
        if bool((table.experts_NK < 0).any()):
            raise TraceInvalid(path, "gives some tokens fewer experts than others; this cannot be replayed")
        self._num_layers = config.num_layers
        self._num_positions = int(table.positions_N.max(initial=-1)) + 1
        if len(table.names) * self._num_positions * self._num_layers >= MAX_PLACES:
            raise TraceInvalid(path, "has positions beyond any context")
        keys_N = self._keys(table.requests_N.astype(np.int64), table.positions_N, table.layers_N)
        # A token that was computed again has the same routing again; the first row of each is kept.
        self._keys_M, first_M = np.unique(keys_N, return_index=True)
        self._experts_MK = torch.from_numpy(table.experts_NK[first_M].astype(np.int64))
        self._weights_MK = torch.from_numpy(table.weights_NK[first_M])
        self._numbers: dict[str, int] = {}
        self._step: tuple[Sequence[SpanOwner], np.ndarray, np.ndarray] | None = None

    def is_native(self, owners: Sequence[SpanOwner]) -> bool:
        """See RoutingPolicy."""
        return False

    def route(self, owners: Sequence[SpanOwner], gate: GateOutput) -> Routing:
        """Raises RoutingMissing for a token that the trace does not have."""
        if self._step is None or self._step[0] is not owners:
            self._step = (owners, *self._places(owners))
        _, requests_T, positions_T = self._step
        is_inside_T = positions_T < self._num_positions
        keys_T = self._keys(requests_T, positions_T, np.int64(gate.layer))
        found_T = np.searchsorted(self._keys_M, keys_T)
        is_there_T = is_inside_T & (found_T < len(self._keys_M))
        is_there_T &= np.append(self._keys_M, -1)[found_T] == keys_T
        if not is_there_T.all():
            first = int(np.argmin(is_there_T))
            raise RoutingMissing(int(requests_T[first]), int(positions_T[first]), gate.layer)
        rows_T = torch.from_numpy(found_T)
        device = gate.logits_TE.device
        return Routing(self._experts_MK[rows_T].to(device), self._weights_MK[rows_T].to(device))

    def _keys(self, requests: np.ndarray, positions: np.ndarray, layers: np.ndarray | np.int64) -> np.ndarray:
        keys: np.ndarray = (requests * self._num_positions + positions) * self._num_layers + layers
        return keys

    def _places(self, owners: Sequence[SpanOwner]) -> tuple[np.ndarray, np.ndarray]:
        """Number of the request and position of each of a step's rows."""
        numbers = [self._numbers.setdefault(o.request.request_id, len(self._numbers)) for o in owners]
        requests = [np.full(o.count, n, dtype=np.int64) for o, n in zip(owners, numbers, strict=True)]
        positions = [np.arange(o.first, o.first + o.count, dtype=np.int64) for o in owners]
        return np.concatenate(requests), np.concatenate(positions)
