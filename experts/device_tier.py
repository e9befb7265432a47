"""Experts on a device, behind them the same or more of them in host memory, and behind these the store.

`TieredCache` is to the worker what `ExpertCache` is without a device, which it has for the host's part. Both tiers keep
their budgets by the same policy (`experts.residency`). What the device lacks is read into host memory where it lacks it
too, copied as it is stored, and computed as it comes, while the experts that were there are computed. An expert that
goes is dropped: host memory or the store has it as it is. Used by `experts.worker`, under its lock.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experts.buffers import BufferPool, DeviceMemory
from experts.cache import CacheOptions, ExpertCache
from experts.device_stacks import DeviceStacks
from experts.eviction import Eviction, make_worth
from experts.ffn import ExpertWeights
from experts.quantised import ExpertForm, FloatForm
from experts.residency import Residency
from experts.shadow import ShadowCaches
from experts.store import ExpertStore
from experts.tier_books import TierBooks
from experts.transfers import Transfer, Transfers, open_transfers
from extraction.manifest import ExpertKey, ExpertRecord


@dataclass(frozen=True)
class TierOptions:
    """The tier behind a device, and the way between them."""

    transfers: Transfers
    host_budget_bytes: int | None = None
    """Of experts in host memory; None means no bound."""
    is_stacked: bool = False
    """Whether experts lie side by side on the device where it holds all of them; see `experts.grouped`."""


@dataclass(frozen=True)
class TierStats:
    """Counters of the tier in host memory since the start."""

    hits: int
    """Experts that the device lacked and that were there."""
    misses: int
    bytes_moved: int
    """From there to the device."""
    resident_bytes: int
    budget_bytes: int | None


def open_tiers(device: torch.device, host_budget_bytes: int | None) -> TierOptions | None:
    """Of a process that computes on a device; None for one that computes in host memory."""
    return None if device.type == "cpu" else TierOptions(open_transfers(device), host_budget_bytes)


class RecordsAsStored:
    """Host memory behind a device holds what the store holds."""

    def loaded_bytes(self, record: ExpertRecord) -> int:
        return record.nbytes

    def is_in_place(self, record: ExpertRecord) -> bool:
        return True

    def weights(self, record: ExpertRecord, raw: Tensor) -> Tensor:
        return raw


class TieredCache:
    """Weights on the device by expert. Not safe for several threads, but `resident` may be asked by any."""

    def __init__(
        self,
        store: ExpertStore,
        form: ExpertForm,
        keys: Collection[ExpertKey],
        options: CacheOptions,
        tiers: TierOptions,
        guests: Collection[ExpertKey] = (),
    ) -> None:
        """options: of the device, but for how records are read. form: what records become there. guests: as of
        `ExpertCache`, in both tiers."""
        self.weights: dict[ExpertKey, ExpertWeights] = {}
        self.hits = self.misses = 0
        self._store, self._form, self._transfers = store, form, tiers.transfers
        behind = replace(
            options, budget_bytes=tiers.host_budget_bytes, memory=tiers.transfers.memory, is_resizable=True
        )
        self._host = ExpertCache(store, RecordsAsStored(), keys, behind, guests)
        budget = options.budget_bytes
        self._memory = DeviceMemory(tiers.transfers.device)
        self._pool = BufferPool(budget, memory=self._memory)
        self._buffers: dict[ExpertKey, Tensor] = {}
        self._copies: list[Transfer] = []
        self._bytes_moved = 0
        records = [store.record(key) for key in keys]
        self._held = {key: form.loaded_bytes(store.record(key)) for key in (*keys, *guests)}
        self._guests = frozenset(guests)
        self._residency = Residency(budget, make_worth(options.eviction, options.trust))
        self.group_bytes = sum(self._held[key] for key in keys)
        largest = max(self._held.values(), default=0)
        self._stacks: DeviceStacks | None = None
        has_room = budget is None or budget >= self.group_bytes
        if (
            tiers.is_stacked
            and has_room
            and isinstance(form, FloatForm)
            and all(map(form.is_in_place, records))
        ):
            self._stacks = DeviceStacks(store, form, keys, tiers.transfers.device)
        self._shadows = None
        if budget is not None and self.group_bytes > budget:
            self._shadows = ShadowCaches(budget, largest, options.eviction, options.trust)
        self._books = TierBooks(self._residency, self._pool, self._shadows, budget, largest)

    @property
    def tier(self) -> TierStats:
        host = self._host
        return TierStats(host.hits, host.misses, self._bytes_moved, host.resident_bytes, host.budget_bytes)

    @property
    def bytes_read(self) -> int:
        """From the store."""
        return self._host.bytes_read

    @property
    def prefetched(self) -> tuple[int, int]:
        """Into host memory; see `ExpertCache.prefetched`."""
        return self._host.prefetched

    @property
    def budget_bytes(self) -> int | None:
        """Of the device."""
        return self._residency.budget_bytes

    def set_budget(self, budget_bytes: int) -> None:
        """Of the device, as `ExpertCache.set_budget`."""
        budget_bytes = self._books.clamped(budget_bytes)
        if self._stacks is not None and budget_bytes < self.group_bytes:
            self._unstack()
        self._books.set_budget(budget_bytes, self._drop)

    @property
    def resident_bytes(self) -> int:
        return self._residency.resident_bytes

    @property
    def allocated_bytes(self) -> int:
        """Of all buffers on the device, free ones too; never above the budget."""
        stacked = 0 if self._stacks is None else self._stacks.allocated_bytes
        return self._pool.allocated_bytes + stacked

    @property
    def host_allocated_bytes(self) -> int:
        """The same of host memory."""
        return self._host.allocated_bytes

    def __len__(self) -> int:
        return len(self._residency)

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """Numbers of the experts of one layer that are on the device now."""
        return self._residency.of_layer(component, layer)

    def hit_rates(self) -> dict[Eviction, float]:
        """See `ExpertCache.hit_rates`; of the device."""
        return self._shadows.hit_rates(self.hits + self.misses, self.hits) if self._shadows else {}

    def at_hand(self, layer: tuple[str, int], experts: Sequence[int]) -> list[ExpertWeights] | None:
        """See `ExpertCache.at_hand`."""
        if self.budget_bytes is not None or self._shadows is not None:
            return None
        keys = [ExpertKey(*layer, expert) for expert in experts]
        found = [self.weights[key] for key in keys if key in self.weights]
        return found if len(found) == len(keys) else None

    def read_ahead(self, key: ExpertKey, now: float) -> bool:
        """See `ExpertCache.read_ahead`: experts come to a device when they are asked for."""
        return False

    def for_good(self, keys: Sequence[ExpertKey]) -> list[ExpertWeights] | None:
        """See `ExpertCache.for_good`: no caller computes by itself on a device."""
        return None

    def note_uses(self, layer: tuple[str, int], experts: Sequence[int], now: float) -> None:
        """See `ExpertCache.note_uses`; without a bound nothing else is to be counted."""
        self.hits += len(experts)

    def waves(self, keys: Sequence[ExpertKey]) -> list[range]:
        """See `Residency.waves`. Raises BudgetTooSmall."""
        return self._residency.waves([self._held[key] for key in keys])

    def first_that_fit(self, keys: Sequence[ExpertKey]) -> Sequence[ExpertKey]:
        """See `Residency.first_that_fit`."""
        return self._residency.first_that_fit(keys, [self._held[key] for key in keys])

    def bring(self, wave: Sequence[ExpertKey], now: float) -> Generator[Sequence[ExpertKey]]:
        """See `ExpertCache.bring`: first those that were on the device, then each as its copy is under way."""
        if self._stacks is not None and self.budget_bytes is not None and not self._guests.isdisjoint(wave):
            self._unstack()  # the budget would be kept by letting single experts go
        sizes = [self._held[key] for key in wave]
        exchange = self._residency.admit(wave, sizes, now)
        if self._shadows is not None:
            self._shadows.use(wave, sizes, now)
        for key in exchange.evict:
            self._drop(key)
        self.hits += len(wave) - len(exchange.load)
        self.misses += len(exchange.load)
        return self._bring(wave, exchange.load, now)

    def prefetch(self, guess: Sequence[ExpertKey]) -> None:
        """Into host memory, as `ExpertCache.prefetch`."""
        self._await_copies()
        self._host.prefetch([key for key in guess if key not in self._residency])

    def let_guests_go(self, keys: Sequence[ExpertKey]) -> None:
        """See `ExpertCache.let_guests_go`; in both tiers, each by its own bound."""
        if self._guests.isdisjoint(keys):
            return
        self._await_copies()
        self._host.let_guests_go(keys)
        if self.budget_bytes is None:
            for key in self._guests.intersection(keys) & self.weights.keys():
                self._residency.forget(key)
                self._drop(key)

    def close(self) -> None:
        """Ends copies and the loading threads; the store belongs to the caller."""
        self._await_copies()
        self._host.close()
        self._transfers.close()

    def _bring(
        self, wave: Sequence[ExpertKey], missing: Sequence[ExpertKey], now: float
    ) -> Generator[Sequence[ExpertKey]]:
        absent = frozenset(missing)
        there = [key for key in wave if key not in absent]
        if not missing:
            yield there
            return
        try:
            for key in missing:
                if self._is_in_place(key):
                    self._buffers[key] = self._take(key)
            self._transfers.follow()  # after all of this memory was taken: others may still compute in it
            for part in self._host.waves(missing):
                # What is read next may take the memory that copies are still read from.
                self._await_copies()
                with closing(self._host.bring(missing[part.start : part.stop], now)) as arrivals:
                    for ready in arrivals:
                        copies = [(key, *self._start(key)) for key in ready]
                        if there:
                            yield there
                            there = []
                        for key, raw, copy in copies:
                            copy.join()
                            self._keep(key, raw)
                            yield [key]
        finally:
            self._forget_absent(absent)

    @torch.inference_mode()
    def _take(self, key: ExpertKey) -> Tensor:
        if self._stacks is None or key in self._guests:
            return self._pool.take(self._held[key])
        return self._stacks.buffer(key)

    def _keep(self, key: ExpertKey, raw: Tensor) -> None:
        weights = self._form.weights(self._store.record(key), raw)
        if self._stacks is not None and key not in self._guests:
            weights = self._stacks.placed(key, weights)
        self.weights[key] = weights

    @torch.inference_mode()
    def _start(self, key: ExpertKey) -> tuple[Tensor, Transfer]:
        target = self._buffers.get(key)
        if (
            target is None
        ):  # what becomes something else on the device passes through memory beside the budget
            target = self._memory.take(self._store.record(key).nbytes, is_aligned=False)
            self._transfers.follow()
        copy = self._transfers.start(self._host.weights[key], target)
        self._copies.append(copy)
        self._bytes_moved += target.numel()
        return target, copy

    def _is_in_place(self, key: ExpertKey) -> bool:
        return self._form.is_in_place(self._store.record(key))

    def _await_copies(self) -> None:
        copies, self._copies = self._copies, []
        for copy in copies:
            copy.wait()

    def _forget_absent(self, absent: Collection[ExpertKey]) -> None:
        """After an error: what did not come is not there, and nothing writes to its memory any more."""
        if all(key in self.weights for key in absent):
            return
        self._await_copies()
        for key in absent:
            if key not in self.weights:
                self._residency.forget(key)
                self._drop(key)

    def _drop(self, key: ExpertKey) -> None:
        self.weights.pop(key, None)
        buffer = self._buffers.pop(key, None)
        if buffer is not None and (self._stacks is None or key in self._guests):
            self._pool.give(buffer)

    def _unstack(self) -> None:
        """Where not all may stay, single ones must be able to go; they are copied anew when they are needed."""
        self._await_copies()
        for key in tuple(self._buffers):
            self._residency.forget(key)
            self._drop(key)
        self._stacks = None
