"""Layers that nobody looks at and whose experts are asked for: one call of our own from one question to the next.

Between the answer for a layer's experts and the question for those of the next layer there is one call to the C source,
and nothing else is done than what they need. The same bits as layer by layer. Which layers they are is decided here,
anew in every step, as in `router.layer_run`, whose layers ask nobody. Called by `router.backbone`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from router.decoder_layer import StepInputs
from router.kv_cache import KvPool
from router.moe_block import MoeBlock
from router.native_dispatch import NativeDispatch
from router.native_layer import NativeLayer
from router.weights import Layer


class AskedLayer(NamedTuple):
    """A layer whose rows go to their own experts, wherever these are."""

    native: NativeLayer
    moe: MoeBlock


class LayerTimes(NamedTuple):
    """Of one layer that is done but for the sum of its experts' rows."""

    attention_s: float
    experts_s: float
    """Of all the rest."""


class AskedRun:
    """Consecutive layers of one step: iterate `compute`, then take `finish`."""

    def __init__(self, first: int, layers: Sequence[AskedLayer], step: StepInputs) -> None:
        """first: of the layers in the cache."""
        assert step.native is not None
        self.first, self.layers = first, layers
        self._step, self._native = step, step.native
        if step.dispatching is None:
            step.dispatching = NativeDispatch(step.native)
        self._dispatching = step.dispatching
        self._rows_RD: Tensor | None = None

    def compute(self, hidden_TD: Tensor, pool: KvPool) -> Iterator[LayerTimes]:
        """Layer after layer. Raises ExpertError."""
        dispatching, routing, trace = self._dispatching, self._step.batch.routing, self._step.batch.trace
        self._native.bind(pool, self.first, self.first + len(self.layers) - 1)
        for index, (native, moe) in enumerate(self.layers, self.first):
            began_s = time.perf_counter()
            call = dispatching.reach(native, moe, index, hidden_TD, self._rows_RD, trace)
            self._rows_RD = moe.directory.run(call)
            if self._step.shown.has_choices:
                routing.watch_choices(moe.layer, dispatching.routing())
            attention_s = dispatching.attention_s
            yield LayerTimes(attention_s, time.perf_counter() - began_s - attention_s)

    def finish(self) -> Tensor:
        """The last layer's rows, (T, D)."""
        assert self._rows_RD is not None, "nothing was asked"
        return self._dispatching.combine(self._rows_RD)


def find_asked_run(first: int, layers: Sequence[Layer], step: StepInputs, most: int) -> AskedRun | None:
    """As many layers from `first` on as go together, `most` of them; None where the first one does not."""
    batch = step.batch
    if step.native is None:
        return None
    found: list[AskedLayer] = []
    for index in range(first, min(first + most, len(layers))):
        native, moe = layers[index].native, layers[index].moe
        if native is None or moe is None or not step.is_plain(moe.layer) or moe.table() is not None:
            break
        found.append(AskedLayer(native, moe))
        if index in batch.capture_layers or index in batch.injections:
            break  # what its rows are then is handed out, or changed, before the next one
    return AskedRun(first, found, step) if found else None
