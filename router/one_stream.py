"""What one stream that decodes token by token would find resident, while many rows are computed at once.

For evaluation. A step of many rows needs most experts of a layer at once, so its misses say little about decoding; one
row a step says it, and takes hours. Here every row of a step, in order, finds what the rows before it left in a cache
that holds a share of each layer's experts, and is routed by that: the same choices, perplexity and misses as a single
stream has under teacher forcing with such a cache, except that mean outputs are those known before the step. No weights
are in these caches: experts are computed by the engine as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experts.eviction import Eviction, make_worth
from experts.residency import Residency
from extraction.manifest import ExpertKey
from router.choosing import Choice, pick
from router.dispatch import Dispatch
from router.expert_facts import Residents
from router.output_means import OutputMeans
from router.scoring import Routing, ScoreFactors, SnarcWeights
from router.stand_in import replace_spared
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner


@dataclass
class StreamCounts:
    """Of experts that single rows asked for."""

    uses: int = 0
    misses: int = 0
    stand_ins: int = 0


class _LayerCache:
    """Which experts of one layer a stream would have in memory."""

    def __init__(self, layer: int, num_experts: int, capacity: int, eviction: Eviction) -> None:
        self._keys = [ExpertKey("", layer, expert) for expert in range(num_experts)]
        self._residency = Residency(capacity, make_worth(eviction))
        self._now = 0
        self.warmth_E = torch.zeros(num_experts)

    def use(self, experts: list[int]) -> set[int]:
        """Count one row's experts as used; returns those that were not there."""
        self._now += 1
        keys = [self._keys[expert] for expert in experts]
        missed: set[int] = set()
        for wave in self._residency.waves([1] * len(keys)):
            part = keys[wave.start : wave.stop]
            exchange = self._residency.admit(part, [1] * len(part), self._now)
            missed.update(key.expert for key in exchange.load)
            self.warmth_E[[key.expert for key in exchange.evict]] = 0.0
            self.warmth_E[[key.expert for key in exchange.load]] = 1.0
        return missed


class OneStream(RoutingWatcher):
    """A `Chooser` for rows whose routing is not native, and a `RoutingWatcher` that counts for those whose is."""

    def __init__(
        self,
        num_experts: int,
        capacity: int,
        eviction: Eviction,
        weights: SnarcWeights,
        means: OutputMeans | None,
    ) -> None:
        """capacity: experts of each layer that stay."""
        self._shape = num_experts, capacity, eviction
        self._weights, self._means = weights, means
        self._caches: dict[int, _LayerCache] = {}
        self.counts = StreamCounts()

    def choose(
        self, gate: GateOutput, logits_RE: Tensor, factors: ScoreFactors | None, k: int, residents: Residents
    ) -> Choice:
        """See Chooser. One row after another, since each finds what the one before it left; `residents` are not those
        of this stream."""
        if factors is None:
            chosen = gate.best(logits_RE, k)
            return Choice(chosen, self._count(gate.layer, chosen.experts_TK), None, chosen)
        cache = self._cache(gate.layer)
        size_E = self._means.sizes(gate.layer) if self._means is not None else None
        rows, spared, cold = [], [], []
        for logits_1E, own in zip(torch.split(logits_RE, 1), _by_row(factors, len(logits_RE)), strict=True):
            facts = replace(own.facts, warmth_E=cache.warmth_E)
            known = own._replace(facts=facts)
            row, _, spared_1K = pick(gate, logits_1E, known, self._weights, k, cache.warmth_E == 0, size_E)
            if spared_1K is None:
                spared_1K = torch.zeros_like(row.experts_TK, dtype=torch.bool)
            missed = cache.use(row.experts_TK[~spared_1K].tolist())
            rows.append(row)
            spared.append(spared_1K)
            cold.append(spared_1K | _among(row.experts_TK.tolist(), [missed]))
        chosen = Routing(
            torch.cat([row.experts_TK for row in rows]), torch.cat([row.weights_TK for row in rows])
        )
        spared_RK, cold_RK = torch.cat(spared), torch.cat(cold)
        num_spared = int(spared_RK.sum())
        self.counts.uses += chosen.experts_TK.numel()
        self.counts.misses += int(cold_RK.sum()) - num_spared
        self.counts.stand_ins += num_spared
        if self._means is None or not num_spared:
            return Choice(chosen, cold_RK, None, chosen)
        routing = replace_spared(chosen, spared_RK, self._means.means(gate.layer), gate.level)
        return Choice(chosen, cold_RK, spared_RK, routing)

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        """See RoutingWatcher; only for steps whose rows all have native routing."""
        self._count(gate.layer, routing.experts_TK)

    def _count(self, layer: int, experts_TK: Tensor) -> Tensor:
        """(T, K) bool: which of them were not there."""
        cache = self._cache(layer)
        rows: list[list[int]] = experts_TK.tolist()
        missed = [cache.use(experts) for experts in rows]
        self.counts.uses += experts_TK.numel()
        self.counts.misses += sum(map(len, missed))
        return _among(rows, missed)

    def _cache(self, layer: int) -> _LayerCache:
        if layer not in self._caches:
            num_experts, capacity, eviction = self._shape
            self._caches[layer] = _LayerCache(layer, num_experts, capacity, eviction)
        return self._caches[layer]


def _by_row(factors: ScoreFactors, num_rows: int) -> list[ScoreFactors]:
    nothing = [None] * num_rows
    surprise = nothing if factors.surprise_T is None else torch.split(factors.surprise_T, 1)
    reward = nothing if factors.reward_T is None else torch.split(factors.reward_T, 1)
    return [ScoreFactors(*own, factors.facts) for own in zip(surprise, reward, strict=True)]


def _among(rows: list[list[int]], some: list[set[int]]) -> Tensor:
    """(T, K) bool: which of a row's experts are among the row's."""
    return torch.tensor([[e in wanted for e in experts] for experts, wanted in zip(rows, some, strict=True)])
