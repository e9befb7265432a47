"""Layers that are computed one after another in a single call, because nobody looks at anything between them.

Which ones they are is decided here, anew in every step: experts may come and go, and watchers want to see some layers
and not others. The same bits as layer by layer. Called by `router.backbone`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from experts.expert_table import ExpertTable
from router.decoder_layer import MANY_ROWS, LayerClock, StepInputs
from router.kv_cache import KvPool
from router.moe_block import MoeBlock
from router.native_layer import NativeLayer
from router.native_step import NativeStep
from router.weights import Layer

LONGEST_S = 0.5
"""For one call, after which others see that there was progress."""


class PlainLayer(NamedTuple):
    """A layer whose rows go to their own experts, all of which are here for good, or that has none."""

    native: NativeLayer
    moe: MoeBlock | None
    table: ExpertTable | None


class LayerRun(NamedTuple):
    """Consecutive layers, and the step that computes them."""

    first: int
    layers: list[PlainLayer]
    native: NativeStep


class RunOutput(NamedTuple):
    hidden_TD: Tensor
    attention_s: float
    experts_s: float


class RunTimes:
    """What a layer took lately, by the size of the number of its rows. A run is no longer than who looks for progress
    can wait, and one layer where nothing is known."""

    def __init__(self) -> None:
        self._layer_s: dict[int, float] = {}

    def most_layers(self, num_rows: int) -> int:
        layer_s = self._layer_s.get(num_rows.bit_length())
        return 1 if layer_s is None else max(1, int(LONGEST_S / layer_s))

    def note(self, num_rows: int, num_layers: int, seconds: float) -> None:
        self._layer_s[num_rows.bit_length()] = max(seconds / num_layers, 1e-9)


def find_run(first: int, layers: Sequence[Layer], step: StepInputs, most: int) -> LayerRun | None:
    """As many layers from `first` on as go together, `most` of them; None where the first one does not.

    Not for many rows: beside their work the way back to the caller takes no time.
    """
    native, batch = step.native, step.batch
    if native is None or batch.num_tokens >= MANY_ROWS:
        return None
    found: list[PlainLayer] = []
    for index in range(first, min(first + most, len(layers))):
        plain = _as_plain(layers[index], step)
        if plain is None:
            break
        found.append(plain)
        if index in batch.capture_layers or index in batch.injections:
            break  # what its rows are then is handed out, or changed, before the next one
    return LayerRun(first, found, native) if found else None


def compute_run(
    run: LayerRun, hidden_TD: Tensor, step: StepInputs, pool: KvPool, clock: LayerClock | None
) -> RunOutput:
    """All layers of the run, residuals included; then says of each who was used, and what was asked for of it."""
    native = run.native
    weights = [(layer.native, layer.table) for layer in run.layers]
    output = RunOutput(*native.layers(run.first, weights, hidden_TD, pool))
    for number, layer in enumerate(run.layers):
        native.look_at(number)
        if clock is not None:
            clock.attended(native)
        if layer.moe is not None and layer.table is not None:
            _tell_use(layer.moe, layer.table, step, native, clock)
    return output


def _tell_use(
    moe: MoeBlock, table: ExpertTable, step: StepInputs, native: NativeStep, clock: LayerClock | None
) -> None:
    """Of the layer that is looked at."""
    moe.note_use(table, native.used, step.batch.num_tokens)
    if step.shown.has_choices:
        step.batch.routing.watch_choices(moe.layer, native.routing())
    if clock is not None:
        clock.mixed(moe.layer, native)


def _as_plain(layer: Layer, step: StepInputs) -> PlainLayer | None:
    moe = layer.moe
    if layer.native is None:
        return None
    if moe is None:
        return PlainLayer(layer.native, None, None)
    table = moe.table() if step.is_plain(moe.layer) else None
    return None if table is None else PlainLayer(layer.native, moe, table)
