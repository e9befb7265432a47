"""What experts answer on average, learned from the traffic: the vectors that stand in for absent experts.

Watches what experts answer, on the engine's thread; `router.means_keeper` copies it from another. Which experts are
replaced is decided by `router.stand_in`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from router.dispatch import Dispatch
from router.scoring import Routing
from router.step_routing import (
    EVERYTHING,
    MAX_UNDER_WAY,
    NOTHING,
    GateOutput,
    RoutingWatcher,
    SpanOwner,
    View,
)

MIN_USES = 64
"""Of an expert, before its mean stands in for it."""
LAYER_EXPONENT = 0.5
"""How far an expert's size counts a layer that adds little as such: 0 compares experts with their own layer only, 1
with the whole model. Between the two cost least on the bundled model."""
HALF_LIFE_USES = 4096
"""After so many uses of the expert, what it answered before counts half."""
FEW_TOKENS = 64
LEARNED_OF = 16
"""Of a layer's steps with few tokens, every so-manieth is learned from: decoding must not wait for it."""


def means_bytes(num_experts: int, width: int, num_layers: int) -> int:
    """What `OutputMeans.nbytes` will be."""
    return num_layers * num_experts * (width + 3) * torch.float32.itemsize


class LayerMeans(NamedTuple):
    """Of one layer, float32."""

    output_ED: Tensor
    """Mean output rows."""
    norm_E: Tensor
    """Mean output norms."""
    uses_E: Tensor
    """How many uses these are means of; earlier ones count less."""


@dataclass
class _Layer:
    means: LayerMeans
    size_E: Tensor
    """Mean norms of experts of which enough is known, infinity for the others."""
    mean_norm: float = 0.0
    """Of all uses in the layer."""

    def learn(self, experts_X: Tensor, counts_X: Tensor, rows_RD: Tensor) -> bool:
        """rows_RD: by expert. False for a call whose rows are not all finite: it would stay in every mean for good."""
        rows_RD = rows_RD.cpu().float()
        norms_R = torch.linalg.vector_norm(rows_RD, dim=-1)
        if not bool(norms_R.isfinite().all()):
            return False
        output_ED, norm_E, uses_E = self.means
        before_X = uses_E[experts_X] * torch.exp2(counts_X / -HALF_LIFE_USES)
        after_X = before_X + counts_X
        uses_E[experts_X] = after_X
        for mean_E, values_R in ((output_ED, rows_RD), (norm_E, norms_R)):
            # Sums first: a weighted copy of all rows would be as large as the call. Not by `index_add`, whose threads
            # wait for each other, for tens of milliseconds where others use the cores.
            wide = (-1,) + (1,) * (mean_E.dim() - 1)
            sums_X = torch.segment_reduce(values_R, "sum", lengths=counts_X, axis=0)
            kept_X = mean_E[experts_X] * (before_X / after_X).view(wide)
            mean_E[experts_X] = kept_X.add_(sums_X.div_(after_X.view(wide)))
        self.summarise()
        return True

    def summarise(self) -> None:
        """What follows from the means."""
        _, norm_E, uses_E = self.means
        self.size_E = torch.where(uses_E >= MIN_USES, norm_E, torch.inf)
        total = float(uses_E.sum())
        self.mean_norm = float(norm_E @ uses_E) / total if total else 0.0


class OutputMeans(RoutingWatcher):
    """The mean outputs of a component's experts, learned from all of its traffic.

    Holds (D + 3) float32 numbers an expert: 8 KB for one of 9.4 MB. `copy` may be called from any thread, all else
    from the engine's.
    """

    def __init__(self, num_experts: int, width: int, layers: Sequence[int]) -> None:
        self.num_experts, self.width = num_experts, width
        """Of each layer; of their rows."""
        self.is_learning = False
        """Set with the first request that could use it: a service that never has one pays nothing."""
        self.num_learned = 0
        """Rows of experts that were learned from, since the start."""
        self._lock = threading.Lock()
        """Held while a layer's means change, and while they are copied."""
        self._layers = {
            layer: _Layer(
                LayerMeans(torch.zeros(num_experts, width), *torch.zeros(2, num_experts)),
                torch.full((num_experts,), torch.inf),
            )
            for layer in layers
        }
        self._numbers = {layer: number for number, layer in enumerate(layers)}
        self._few_steps = 0
        """Steps with few tokens, of which every layer has its turn."""
        self._due: list[tuple[Sequence[SpanOwner], set[int]]] = []
        """Of those under way, the layers whose turn it is: steps may come between the layers of another."""
        self._norm_of_layers, self._num_seen = 0.0, 0
        """Of layers that something is known of: the sum of their mean norms, and how many they are."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._layers)

    @property
    def nbytes(self) -> int:
        return sum(
            sum(part.nbytes for part in layer.means) + layer.size_E.nbytes for layer in self._layers.values()
        )

    @property
    def num_known(self) -> int:
        """Experts of which enough is known."""
        return sum(int(layer.size_E.isfinite().sum()) for layer in self._layers.values())

    def wanted(self, owners: Sequence[SpanOwner]) -> View:
        """See RoutingWatcher.wanted."""
        if not self.is_learning:
            return NOTHING
        if sum(owner.count for owner in owners) >= FEW_TOKENS:
            return EVERYTHING
        self._few_steps += 1
        due = {x for x, n in self._numbers.items() if (self._few_steps + n) % LEARNED_OF == 0}
        if due:
            self._due = [*self._due, (owners, due)][-MAX_UNDER_WAY:]
        return View(frozenset(due))

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        """See RoutingWatcher: learn from every step with many tokens, and from some with few."""
        is_few = len(gate.hidden_TD) < FEW_TOKENS
        if not self.is_learning or (is_few and not self._take_turn(owners, gate.layer)):
            return
        layer, call = self._layers[gate.layer], dispatched.call
        before = layer.mean_norm
        with self._lock:
            is_learned = layer.learn(torch.tensor(call.experts), torch.tensor(call.counts), rows_RD)
        self.num_learned += len(rows_RD) if is_learned else 0
        self._count_norm(before, layer.mean_norm)

    def sizes(self, layer: int) -> Tensor:
        """(E,) how large the experts' outputs are, around 1; infinity where too little is known.

        A mean norm as a part of the layer's own to the power 1 - LAYER_EXPONENT times the layers' mean to the power
        LAYER_EXPONENT.
        """
        known = self._layers[layer]
        model = self._norm_of_layers / max(1, self._num_seen)
        unit: float = known.mean_norm ** (1 - LAYER_EXPONENT) * model**LAYER_EXPONENT
        return known.size_E / max(unit, 1e-9)

    def means(self, layer: int) -> Tensor:
        """(E, D) mean outputs; not to be changed."""
        return self._layers[layer].means.output_ED

    def copy(self, layer: int) -> LayerMeans:
        """As they are at this moment."""
        with self._lock:
            return LayerMeans(*(part.clone() for part in self._layers[layer].means))

    def restore(self, layer: int, means: LayerMeans) -> None:
        """In place of what was learned."""
        known = self._layers[layer]
        before = known.mean_norm
        for own, given in zip(known.means, means, strict=True):
            own.copy_(given)
        known.summarise()
        self._count_norm(before, known.mean_norm)

    def _take_turn(self, owners: Sequence[SpanOwner], layer: int) -> bool:
        """Whether it is the layer's turn in that step."""
        due = next((due for known, due in self._due if known is owners), set[int]())
        if layer not in due:
            return False
        due.remove(layer)
        self._due = [(known, left) for known, left in self._due if left]
        return True

    def _count_norm(self, before: float, after: float) -> None:
        self._norm_of_layers += after - before
        self._num_seen += not before and after > 0
