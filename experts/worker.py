"""Holds a group of experts under a byte budget and computes calls for them.

The same class runs in the router's process and inside an expert actor. A call may need more experts than the
budget holds; it is then computed in waves, with the same bits. Loading is synchronous.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experts.budget import loaded_bytes
from experts.call import ExpertCall
from experts.errors import NotInGroup
from experts.ffn import ExpertWeights, compute_experts, view_expert
from experts.numerics import RowKernel, numerics_class
from experts.residency import Residency
from experts.store import ExpertStore
from extraction.manifest import ExpertKey

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class WorkerStats:
    """Counters since the start; read by status and metrics."""

    calls: int = 0
    rows: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    experts_used: set[ExpertKey] = field(default_factory=set)


class ExpertWorker:
    """Computes the experts of one group. Calls from several threads are computed one after another."""

    def __init__(
        self,
        store: ExpertStore,
        kernel: RowKernel,
        dtype: torch.dtype,
        *,
        widths: dict[str, int],
        group: Collection[ExpertKey] | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        """widths: model width D of each component. group: the experts it answers for; None means all of these."""
        self.dtype = dtype
        self.numerics_class = numerics_class(torch.device("cpu"), dtype, kernel)
        self.stats = WorkerStats()
        self._store = store
        self._kernel = kernel
        self._widths = widths
        self._group = None if group is None else frozenset(group)
        self._residency = Residency(budget_bytes)
        self._weights: dict[ExpertKey, ExpertWeights] = {}
        self._lock = threading.Lock()

    @property
    def budget_bytes(self) -> int | None:
        """Most bytes of experts that stay; None means no bound."""
        return self._residency.budget_bytes

    @property
    def resident_bytes(self) -> int:
        return self._residency.resident_bytes

    @property
    def num_resident(self) -> int:
        return len(self._residency)

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """Numbers of the experts of one layer that are in memory now; any thread may ask."""
        return self._residency.of_layer(component, layer)

    def compute(self, call: ExpertCall) -> Tensor:
        """The call's R output rows, (R, D) in this worker's dtype.

        Raises NotInGroup, UnknownExpert, BudgetTooSmall, or what reading the store raises.
        """
        keys = [ExpertKey(call.component, call.layer, expert) for expert in call.experts]
        for key in keys:
            if not self._answers_for(key):
                raise NotInGroup(str(tuple(key)))
        sizes = [self._loaded_bytes(key) for key in keys]
        with self._lock:
            waves = self._residency.waves(sizes)
            parts = [self._compute_wave(call, wave, keys, sizes) for wave in waves]
            self.stats.calls += 1
            self.stats.rows += call.num_rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def load_all(self) -> None:
        """Read as much of the group as the budget holds, so that the first requests find it."""
        for key in self._store.expert_keys():
            if not self._answers_for(key):
                continue
            with self._lock:
                nbytes = self._loaded_bytes(key)
                budget = self._residency.budget_bytes
                if budget is not None and self._residency.resident_bytes + nbytes > budget:
                    return
                self._make_resident([key], [nbytes])

    def _answers_for(self, key: ExpertKey) -> bool:
        return key.component in self._widths and (self._group is None or key in self._group)

    def _compute_wave(self, call: ExpertCall, wave: range, keys: list[ExpertKey], sizes: list[int]) -> Tensor:
        wave_keys = keys[wave.start : wave.stop]
        self._make_resident(wave_keys, sizes[wave.start : wave.stop])
        self.stats.experts_used.update(wave_keys)
        part = call if len(wave_keys) == len(keys) else _restrict(call, wave)
        return compute_experts(part, [self._weights[key] for key in wave_keys], self._kernel)

    def _make_resident(self, keys: list[ExpertKey], sizes: list[int]) -> None:
        exchange = self._residency.admit(keys, sizes)
        for key in exchange.evict:
            del self._weights[key]
        missing = list(exchange.load)
        try:
            while missing:
                self._weights[missing[0]] = self._load(missing[0])
                missing.pop(0)
        finally:
            for key in missing:
                self._residency.forget(key)
        self.stats.misses += len(exchange.load)
        self.stats.hits += len(keys) - len(exchange.load)

    def _load(self, key: ExpertKey) -> ExpertWeights:
        record = self._store.record(key)
        raw = self._store.read_expert(key)
        self.stats.bytes_read += raw.numel()
        stored = DTYPES[record.dtype]
        if stored != self.dtype:
            raw = raw.view(stored).to(self.dtype).view(torch.uint8)
        return view_expert(raw, self.dtype, self._widths[key.component])

    def _loaded_bytes(self, key: ExpertKey) -> int:
        return loaded_bytes(self._store.record(key), self.dtype)


def _restrict(call: ExpertCall, wave: range) -> ExpertCall:
    first = sum(call.counts[: wave.start])
    counts = call.counts[wave.start : wave.stop]
    return ExpertCall(
        call.component,
        call.layer,
        call.experts[wave.start : wave.stop],
        counts,
        call.token_of_R[first : first + sum(counts)],
        call.tokens_TD,
        call.request_id,
    )
