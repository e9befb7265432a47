"""Watches an engine and turns what it sees into observations of trust. Never changes what it is given.

Of the layers that are computed it looks closely at every 48th, those of a model in turn, one round at stability and the
next at efficiency, and asks to be shown no other; of prompts it notes the experts in all layers, and looks at a few
positions whose NLL the engine gives. All methods but `reward` and `flush` are called on the engine's thread. Keeps no
text and no token ids.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from experts.trust import (
    CONVERGENCE,
    EFFICIENCY,
    STABILITY,
    bucket_means,
    bucket_of,
    empty_table,
    observe,
    observe_buckets,
)
from experts.trust_book import TrustBook
from router.dispatch import Dispatch
from router.scoring import ABSENT, Routing
from router.step_routing import MAX_UNDER_WAY, NOTHING, GateOutput, RoutingWatcher, SpanOwner, View
from router.trust_options import LAYERS_A_LOOK
from router.trust_signals import (
    consistency,
    contribution_shares,
    convergence_values,
    efficiency_values,
    sampled_positions,
    sketch_matrix,
)

SKETCH_SIZE = 64
MAX_TOKENS_A_STEP, MAX_EXPERTS_A_STEP = 16, 32
"""How many of the layer's tokens and experts are looked at; evenly spaced where there are more."""
TOKENS_A_FLUSH = 256
"""How often observations reach the book, in tokens."""
MAX_REQUESTS = 512
"""Requests, running or ended, whose experts are remembered for a reward; the longest unused goes first."""
REWARD_WEIGHT = 8.0
"""Observations that a reward counts as, in each layer, shared out among the experts that served the request."""


@dataclass
class _Pass:
    """Rows on their way through the layers."""

    owners: Sequence[SpanOwner]
    turn: int | None
    """The layer that is looked at closely, by its place among those with experts; None looks at none."""
    round: int
    slots_T: Tensor
    """Where each row's use of experts is counted."""
    sampled_N: Tensor
    """Rows whose NLL the engine gives."""
    sampled: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each layer so far: flat expert numbers and mixing weights of the sampled rows, (N, K) each."""
    is_done: bool = False
    """Whether nothing more is wanted of it."""


class TrustCollector(RoutingWatcher):
    """A `RoutingWatcher` and `PromptProbe` of one engine."""

    def __init__(self, book: TrustBook, width: int, layers_a_look: int = LAYERS_A_LOOK) -> None:
        """width: D of the model."""
        self.book = book
        view = book.view()
        self._component, self._layers = view.component, view.layers
        self._num_layers, self._num_experts = len(view.layers), view.num_experts
        self._row_of_layer = {layer: row for row, layer in enumerate(view.layers)}
        self._lock = threading.Lock()
        self._layers_a_look = layers_a_look
        self._num_unseen = layers_a_look - self._num_layers  # the first pass is looked at
        """Layers computed since the last look."""
        self._turn, self._round = -1, -1
        self._passes: list[_Pass] = []
        self._pass = _Pass((), None, 0, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        self._start, self._tokens = view.now, 0
        self._pending = empty_table(self._component, self._layers, self._num_experts, self._start)
        self._sketch_DS = sketch_matrix(width, SKETCH_SIZE)
        memory = torch.zeros(2, self._num_layers, self._num_experts, SKETCH_SIZE)
        self._inputs_LES, self._outputs_LES = memory
        self._requests: OrderedDict[str, int] = OrderedDict()
        self._usage_QLE = torch.zeros(MAX_REQUESTS, self._num_layers, self._num_experts)

    @property
    def _now(self) -> float:
        return self._start + self._tokens

    def positions(self, owner: SpanOwner) -> Sequence[int]:
        """See PromptProbe.positions."""
        end = owner.first + owner.count
        num_prompt = len(owner.request.prompt_ids)
        if owner.first >= num_prompt:
            return ()
        ids, media = owner.request.prompt_ids, owner.request.media
        sampled = [p for p in sampled_positions(num_prompt) if owner.first <= p < end]
        # Nobody foresees a token that stands for media: it is the same for all images.
        standing = {ids[placed.first] for placed in media}
        return [p for p in sampled if ids[p + 1] not in standing] if media else sampled

    def wanted(self, owners: Sequence[SpanOwner]) -> View:
        """See RoutingWatcher.wanted: one layer in turn, where it is time, and the choices of a prompt's rows."""
        self._count_tokens(owners)
        turn = self._next_turn()
        if turn is None and all(owner.first >= len(owner.request.prompt_ids) for owner in owners):
            return NOTHING
        under_way = [seen for seen in self._passes if not seen.is_done]
        begun = self._begin_pass(owners, turn)
        self._passes = [*under_way[-MAX_UNDER_WAY:], begun]
        layers = () if begun.turn is None else (self._layers[begun.turn],)
        return View(layers, has_choices=len(begun.sampled_N) > 0)

    def watch_choices(self, owners: Sequence[SpanOwner], layer: int, routing: Routing) -> None:
        """See RoutingWatcher.watch_choices."""
        self._look_at(owners, layer, routing)

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        """See RoutingWatcher.watch."""
        row = self._row_of_layer[gate.layer]
        seen = self._look_at(owners, gate.layer, routing)
        if seen is not None and row == seen.turn:
            with self._lock:
                if seen.round % 2:
                    self._observe_efficiency(row, routing, dispatched, rows_RD)
                else:
                    self._observe_stability(row, gate, dispatched, rows_RD)

    def scored(self, token_ids: Sequence[int], nll_N: Tensor) -> None:
        """See PromptProbe.scored."""
        sampled, self._pass.sampled = self._pass.sampled, []
        if len(sampled) != self._num_layers:
            return  # rows that no expert served: the model's own layers without experts, or a step that failed
        buckets_N = bucket_of(np.asarray(token_ids, dtype=np.int64))
        observed_N = nll_N.double().cpu().numpy()
        with self._lock:
            known = (self.book.view(), self._pending)
            expected_N = bucket_means(known, self.book.settings)[buckets_N]
            values_N = convergence_values(torch.from_numpy(observed_N), torch.from_numpy(expected_N))
            for experts_NK, weights_NK in sampled:
                shares_NK = weights_NK.double() / weights_NK.double().sum(dim=1, keepdim=True)
                self._add(CONVERGENCE, experts_NK, values_N.unsqueeze(1).expand_as(shares_NK), shares_NK)
            is_usable_N = np.isfinite(observed_N)
            kept = (buckets_N[is_usable_N], observed_N[is_usable_N])
            observe_buckets(self._pending, *kept, self._now, self.book.settings)

    def _look_at(self, owners: Sequence[SpanOwner], layer: int, routing: Routing) -> _Pass | None:
        """Where these rows have come to a layer. None for those that were forgotten, since too many others have begun
        and not ended."""
        row = self._row_of_layer[layer]
        seen = next((seen for seen in self._passes if seen.owners is owners), None)
        if seen is None:
            return None
        self._pass = seen
        seen.is_done |= row == (self._num_layers - 1 if len(seen.sampled_N) else seen.turn)
        if len(seen.sampled_N) or row == seen.turn:
            with self._lock:
                self._count_usage(row, routing)
        if len(seen.sampled_N):
            experts_NK = routing.indices_TK[seen.sampled_N] + row * self._num_experts
            seen.sampled.append((experts_NK, routing.weights_TK[seen.sampled_N]))
        return seen

    def reward(self, request_id: str, score: float) -> bool:
        """Credit a request's feedback in [-1, 1] to the experts that served it; from any thread.

        False when the request is not remembered (any more). Raises ValueError for another score.
        """
        if not (math.isfinite(score) and -1.0 <= score <= 1.0):
            raise ValueError(f"a reward is a number from -1 to 1, not {score}")
        with self._lock:
            slot = self._requests.get(request_id)
            if slot is None:
                return False
            usage_LE = self._usage_QLE[slot].double()
            shares_LE = REWARD_WEIGHT * usage_LE / usage_LE.sum(dim=1, keepdim=True).clamp_min(1e-12)
            experts_LE = torch.arange(shares_LE.numel()).view_as(shares_LE)
            self._add(CONVERGENCE, experts_LE, torch.full_like(shares_LE, (1.0 + score) / 2.0), shares_LE)
            self._flush()
        return True

    def flush(self) -> None:
        """Give the book what was observed since the last time; from any thread."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if not self._tokens and not self._pending.counts_ALE.any():
            return
        self.book.add(replace(self._pending, num_tokens=self._tokens))
        self._start, self._tokens = max(self._now, self.book.view().now), 0
        self._pending = empty_table(self._component, self._layers, self._num_experts, self._start)

    def _count_tokens(self, owners: Sequence[SpanOwner]) -> None:
        with self._lock:
            if self._tokens >= TOKENS_A_FLUSH:
                self._flush()
            self._tokens += sum(owner.count for owner in owners)

    def _begin_pass(self, owners: Sequence[SpanOwner], turn: int | None) -> _Pass:
        counts = [owner.count for owner in owners]
        with self._lock:
            slots = torch.tensor([self._slot(owner.request.request_id) for owner in owners])
        slots_T = slots.repeat_interleave(torch.tensor(counts)) if max(counts) > 1 else slots
        starts = accumulate(counts, initial=0)
        sampled = [
            start + position - owner.first
            for start, owner in zip(starts, owners, strict=False)
            for position in self.positions(owner)
        ]
        sampled_N = torch.tensor(sampled, dtype=torch.int64)
        is_done = turn is None and not sampled
        return _Pass(owners, turn, self._round, slots_T, sampled_N, is_done=is_done)

    def _next_turn(self) -> int | None:
        """Of a pass through all layers."""
        self._num_unseen += self._num_layers
        if self._num_unseen < self._layers_a_look:
            return None
        self._num_unseen %= self._layers_a_look
        self._turn = (self._turn + 1) % self._num_layers
        self._round += not self._turn
        return self._turn

    def _slot(self, request_id: str) -> int:
        """Where a request's use of experts is counted."""
        slot = self._requests.get(request_id)
        if slot is None:
            is_full = len(self._requests) == MAX_REQUESTS
            slot = self._requests.popitem(last=False)[1] if is_full else len(self._requests)
            self._usage_QLE[slot] = 0.0
            self._requests[request_id] = slot
        self._requests.move_to_end(request_id)
        return slot

    def _count_usage(self, row: int, routing: Routing) -> None:
        cells_TK = (self._pass.slots_T * self._num_layers + row).unsqueeze(
            1
        ) * self._num_experts + routing.indices_TK
        self._usage_QLE.view(-1).index_add_(0, cells_TK.flatten(), routing.weights_TK.flatten().float())

    def _observe_stability(self, row: int, gate: GateOutput, dispatched: Dispatch, rows_RD: Tensor) -> None:
        """Each expert's first row of the step against the one that was remembered, which it then replaces."""
        call = dispatched.call
        some = self._some(len(call.experts), MAX_EXPERTS_A_STEP)
        firsts = list(accumulate(call.counts[:-1], initial=0))[some]
        tokens = [call.token_of_R[first] for first in firsts]
        experts_G = torch.tensor(call.experts[some])
        inputs_GS = gate.hidden_TD[tokens].cpu().float() @ self._sketch_DS
        outputs_GS = rows_RD[firsts].cpu().float() @ self._sketch_DS
        inputs_ES, outputs_ES = self._inputs_LES[row], self._outputs_LES[row]
        values_G, weights_G = consistency(inputs_GS, outputs_GS, inputs_ES[experts_G], outputs_ES[experts_G])
        self._add(STABILITY, experts_G + row * self._num_experts, values_G, weights_G)
        inputs_ES[experts_G], outputs_ES[experts_G] = inputs_GS, outputs_GS

    def _observe_efficiency(self, row: int, routing: Routing, dispatched: Dispatch, rows_RD: Tensor) -> None:
        """An expert's weights are moved once for all its rows of the step; its work grows with the rows."""
        num_tokens, num_ranks = routing.experts_TK.shape
        some = self._some(num_tokens, MAX_TOKENS_A_STEP)
        experts = routing.indices_TK[some].flatten()
        is_present = (routing.experts_TK[some] != ABSENT).flatten()
        weights_TK = routing.weights_TK[some].float()
        row_of_slot = dispatched.row_of_slot.view(num_tokens, num_ranks)[some].flatten()
        norms = torch.linalg.vector_norm(rows_RD[row_of_slot].cpu(), dim=1, dtype=torch.float32)
        shares_TK = contribution_shares(norms.view_as(weights_TK), weights_TK)
        nothing_E = torch.zeros(self._num_experts)
        rows_E = nothing_E.index_add(0, experts, is_present.float())
        gained_E = nothing_E.index_add(0, experts, shares_TK.flatten())
        count_E = nothing_E.clone()
        count_E[list(dispatched.call.experts)] = torch.tensor(dispatched.call.counts, dtype=torch.float32)
        values_E = efficiency_values(gained_E, rows_E / count_E.clamp_min(1.0), rows_E)
        self._add(EFFICIENCY, torch.arange(self._num_experts) + row * self._num_experts, values_E, rows_E)

    def _some(self, count: int, limit: int) -> slice:
        """Evenly spaced items, at most `limit`, others each round."""
        stride = -(-count // limit)
        return slice(self._pass.round // 2 % stride, None, stride)

    def _add(self, aspect: int, experts: Tensor, values: Tensor, weights: Tensor) -> None:
        """Flat expert numbers, with an observation and its weight each."""
        experts_N, values_N, weights_N = (
            part.flatten().cpu().numpy() for part in (experts, values.double(), weights.double())
        )
        observe(self._pending, aspect, experts_N, values_N, weights_N, self._now, self.book.settings)
