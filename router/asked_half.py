"""The second half of a layer that nobody looks at and whose experts are asked for, where it has to pause for others.

Gate and sort, the experts in parts, their sum: each of these may pause in the middle. The same bits as at once. Called
by `router.decoder_layer`.
"""

from __future__ import annotations

import time

from torch import Tensor

from router.moe_block import CallInParts, MoeBlock
from router.native_dispatch import NativeDispatch
from router.native_layer import NativeLayer
from router.scoring import Routing


class AskedHalf:
    """On its way: `advance` until its rows are there."""

    def __init__(
        self,
        dispatching: NativeDispatch,
        native: NativeLayer,
        moe: MoeBlock,
        hidden_TD: Tensor,
        trace: str,
        expert_s: float,
    ) -> None:
        """hidden_TD: what the half is added to. expert_s: as of `CallInParts`."""
        self._dispatching, self._native, self._moe = dispatching, native, moe
        self._hidden_TD, self._trace = hidden_TD, trace
        self.expert_s = expert_s
        """See `CallInParts.expert_s`."""
        self._parts: CallInParts | None = None
        self._rows_RD: Tensor | None = None

    def advance(self, until_ns: int | None = None) -> Tensor | None:
        """hidden + experts(norm(hidden)), (T, D) in the model's dtype.

        until_ns: monotonic clock; None is returned where something is left then, and the next call goes on. Something
        is always done. Raises ExpertError, MemoryError.
        """
        if self._parts is None:
            call = self._dispatching.dispatch(self._native, self._moe, self._hidden_TD, self._trace, until_ns)
            if call is None:
                return None
            self._parts = CallInParts(self._moe.directory, call, self.expert_s)
            if _is_over(until_ns):
                return None
        if self._rows_RD is None:
            self._rows_RD = self._parts.advance(until_ns)
            self.expert_s = self._parts.expert_s
            if self._rows_RD is None or _is_over(until_ns):
                return None
        return self._dispatching.combine(self._rows_RD, until_ns)

    def routing(self) -> Routing:
        """How the layer's rows were routed; the caller's own."""
        return self._dispatching.routing()


def _is_over(until_ns: int | None) -> bool:
    return until_ns is not None and time.monotonic_ns() >= until_ns
