"""Layers that nobody looks at and whose experts are asked for.

Where the C source can ask the actors itself (`experts.exchange`), such layers are one call. Else there is one between
the answer for a layer's experts and the question for those of the next layer. The same bits as layer by layer. Which
layers they are is decided here, anew in every step, as in `router.layer_run`, whose layers ask nobody. Called by
`router.backbone`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from router.decoder_layer import StepInputs
from router.kv_cache import KvPool
from router.native_dispatch import AskedLayer, NativeDispatch
from router.weights import Layer


class AskedTimes(NamedTuple):
    """Of layers that are done but for the sum of the last one's rows."""

    num_layers: int
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
        self._num_done = 0
        if step.dispatching is None:
            step.dispatching = NativeDispatch(step.native)
        self._dispatching = step.dispatching
        self._rows_RD: Tensor | None = None

    def compute(self, hidden_TD: Tensor, pool: KvPool, most: int) -> Iterator[AskedTimes]:
        """Layer after layer, or up to `most` at once. Raises ExpertError."""
        self._native.bind(pool, self.first, self.first + len(self.layers) - 1)
        while self._num_done < len(self.layers):
            began_s = time.perf_counter()
            layers = self.layers[self._num_done : self._num_done + most]
            num_done = self._ask(layers, hidden_TD) or self._reach(layers[0], hidden_TD)
            if self._step.shown.has_choices:
                for back, layer in zip(reversed(range(num_done)), layers, strict=False):
                    routing = self._dispatching.routing(back)
                    self._step.batch.routing.watch_choices(layer.moe.layer, routing)
            self._num_done += num_done
            attention_s = self._dispatching.attention_s
            yield AskedTimes(num_done, attention_s, time.perf_counter() - began_s - attention_s)

    def _ask(self, layers: Sequence[AskedLayer], hidden_TD: Tensor) -> int:
        """The C source asks itself, where it can. Returns how many layers are done, maybe none."""
        moe, trace = layers[0].moe, self._step.batch.trace
        numbers, num_experts = tuple(layer.moe.layer for layer in layers), moe.config.experts_per_token
        exchange = moe.directory.exchange(moe.component, numbers, moe.config.num_experts)
        num_tokens, width = self._native.shape
        if exchange is None or not exchange.takes(
            num_tokens, num_tokens * num_experts, width, self._native.dtype
        ):
            return 0
        first = self.first + self._num_done
        asked = self._dispatching.ask(exchange, layers, first, hidden_TD, self._rows_RD, trace)
        if asked is None:
            return 0
        num_done, self._rows_RD = asked
        return num_done

    def _reach(self, layer: AskedLayer, hidden_TD: Tensor) -> int:
        """One layer, whose experts are asked for in Python."""
        index, trace = self.first + self._num_done, self._step.batch.trace
        call = self._dispatching.reach(layer.native, layer.moe, index, hidden_TD, self._rows_RD, trace)
        self._rows_RD = layer.moe.directory.run(call)
        return 1

    def finish(self) -> Tensor:
        """The last layer's rows, (T, D)."""
        assert self._rows_RD is not None, "nothing was asked"
        combined_TD = self._dispatching.combine(self._rows_RD)
        assert combined_TD is not None, "nobody lets it pause"
        return combined_TD


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
