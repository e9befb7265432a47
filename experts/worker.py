"""Holds a group of experts under a byte budget and computes calls for them.

The same class runs in the router's process and inside an expert actor. A call may need more experts than the
budget holds; it is then computed in waves. Large experts are computed as they come: those that are in memory first,
while the others are read. The bits are the same in any case, since an expert's rows depend on no other expert.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from experts.cache import CacheOptions, ExpertCache
from experts.call import ExpertCall
from experts.desk import Desk
from experts.device_tier import TieredCache, TierOptions, TierStats
from experts.devices import upload
from experts.errors import ExpertError, NotInGroup
from experts.eviction import DEFAULT_EVICTION, Eviction
from experts.expert_table import ExpertTable
from experts.ffn import ExpertWeights, compute_experts
from experts.loader import LOAD_THREADS
from experts.native_plane import Lock
from experts.numerics import RowKernel, numerics_class
from experts.quantised import expert_form
from experts.store import ExpertStore
from extraction.manifest import ExpertKey

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


@dataclass
class WorkerStats:
    """Counters since the start; read by status and metrics."""

    calls: int = 0
    rows: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    experts_used: set[ExpertKey] = field(default_factory=set)
    hit_rates: dict[Eviction, float] = field(default_factory=dict)
    """See `ExpertCache.hit_rates`."""
    prefetched: int = 0
    """Experts read because the layer before them was taken to know them; see `ExpertCache.prefetched`."""
    prefetched_used: int = 0
    """Of these, those that were then needed."""
    behind: TierStats | None = None
    """Of host memory behind a device; None where experts are computed where they are read to."""


class ExpertWorker:
    """Computes the experts of one group, and maybe others as guests. Calls are computed one after another, whatever
    threads they come from."""

    def __init__(
        self,
        store: ExpertStore,
        kernel: RowKernel,
        dtype: torch.dtype,
        *,
        widths: dict[str, int],
        group: Collection[ExpertKey] | None = None,
        budget_bytes: int | None = None,
        eviction: Eviction = DEFAULT_EVICTION,
        trust: Callable[[ExpertKey], float] | None = None,
        direct: bool | None = None,
        copies: Sequence[Path] = (),
        has_guests: bool = False,
        tiers: TierOptions | None = None,
        is_resizable: bool = True,
        is_served: bool = False,
    ) -> None:
        """widths: model width D of each component. group: the experts it is for; None means all of these.
        has_guests: whether it also computes, for whoever lost an actor, the other experts of these components.
        tiers: of a kernel that computes on a device, where the budget then is. is_served: whether calls come over
        sockets, so that there is to be a desk where there can be one.

        The other options are those of `CacheOptions`.
        """
        self.dtype = dtype
        form = expert_form(store, kernel, dtype, widths)
        self.numerics_class = numerics_class(kernel.device, dtype, kernel) + form.class_suffix
        self._stats = WorkerStats()
        self._store = store
        self._kernel = kernel
        self.widths = widths
        self._group = None if group is None else frozenset(group)
        self._has_guests = has_guests
        known = [key for key in store.expert_keys() if key.component in widths]
        self._keys = tuple(key for key in known if self._is_for(key))
        guests = [key for key in known if not self._is_for(key)] if has_guests else []
        options = CacheOptions(
            budget_bytes, eviction, trust, direct, tuple(copies), is_resizable=is_resizable
        )
        self.cache: ExpertCache[ExpertWeights] | TieredCache
        if tiers is None:
            self.cache = ExpertCache(store, form, self._keys, options, guests)
        else:
            tiers = replace(tiers, is_stacked=kernel.grouping == "grouped")
            self.cache = TieredCache(store, form, self._keys, options, tiers, guests)
        self._used: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
        """Numbers of the experts that were asked for, by layer."""
        self._steps: dict[tuple[str, int], int] = {}
        self._now = 0
        self.desk: Desk | None = None
        """Where the C source computes calls without this class."""
        if is_served and isinstance(self.cache, ExpertCache) and self.cache.is_counted_later:
            self.desk = Desk.of(kernel, dtype, widths, (*self._keys, *guests))
        if self.desk is not None and isinstance(self.cache, ExpertCache):
            self.cache.on_change = self.desk.show
        self._lock: Lock = threading.Lock() if self.desk is None else self.desk.lock
        """Of who computes, and of who changes what is in memory."""
        self._keys_of: dict[tuple[str, int], list[ExpertKey]] = {}
        for key in self._keys:
            self._keys_of.setdefault((key.component, key.layer), []).append(key)
        self._unread = iter(self._keys)
        """What is left to be looked at by `load_more`."""
        self._tables: dict[tuple[str, int], ExpertTable] = {}
        self._tried: dict[tuple[str, int], int] = {}
        """How many experts there were when a table could not be made."""

    @property
    def stats(self) -> WorkerStats:
        """As of now; but of what the desk computed, as of the last call where one is computed now."""
        stats, cache = self._stats, self.cache
        if self.desk is not None and self._lock.acquire(blocking=False):
            try:
                self._count_served()
            finally:
                self._lock.release()
        stats.experts_used = {
            ExpertKey(*layer, expert) for layer, used in self._used.copy().items() for expert in used.copy()
        }
        stats.hits, stats.misses, stats.bytes_read = cache.hits, cache.misses, cache.bytes_read
        stats.hit_rates = cache.hit_rates()
        stats.prefetched, stats.prefetched_used = cache.prefetched
        stats.behind = cache.tier if isinstance(cache, TieredCache) else None
        return stats

    @property
    def budget_bytes(self) -> int | None:
        """Most bytes of experts that stay; None means no bound."""
        return self.cache.budget_bytes

    def set_budget(self, budget_bytes: int) -> None:
        """See `ExpertCache.set_budget`; between two calls, so waits for the one that is computed. Changes no bit."""
        with self._lock:
            self._count_served()
            self.cache.set_budget(budget_bytes)

    @property
    def group_bytes(self) -> int:
        """Of all experts that it is for, in memory."""
        return self.cache.group_bytes

    @property
    def resident_bytes(self) -> int:
        return self.cache.resident_bytes

    @property
    def num_resident(self) -> int:
        return len(self.cache)

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """Numbers of the experts of one layer that are in memory now; any thread may ask."""
        return self.cache.resident(component, layer)

    def compute(self, call: ExpertCall) -> Tensor:
        """The call's R output rows, (R, D) in this worker's dtype.

        Where they are: as the call's tokens, though a device computes.
        Raises NotInGroup, UnknownExpert, BudgetTooSmall, or what reading the store raises.
        """
        if not self._kernel.is_on_cpu and call.tokens_TD.is_cpu:
            return self._compute_for_host(call)
        layer = call.component, call.layer
        with self._lock:
            self._count_served()
            at_hand = self.cache.at_hand(layer, call.experts)
            if at_hand is not None:
                rows_RD = compute_experts(call, at_hand, self._kernel)
                self._count_use(layer, call.experts, call.num_rows)
            else:
                rows_RD = self._compute_waves(call, [ExpertKey(*layer, expert) for expert in call.experts])
                self._stats.calls += 1
                self._stats.rows += call.num_rows
        return rows_RD

    @torch.inference_mode()
    def _compute_for_host(self, call: ExpertCall) -> Tensor:
        """A call that came over a socket, on a device: its tokens go there, and its rows come back at once."""
        there = call._replace(tokens_TD=upload(call.tokens_TD, self._kernel.device))
        return self.compute(there).cpu()

    def table(self, component: str, layer: int) -> ExpertTable | None:
        """All experts of a layer, where our own products take them and they stay in memory for good. Who computes
        with it says so by `note_use`."""
        at = (component, layer)
        found = self._tables.get(at)
        if (
            found is None
            and self._kernel.product == "native"
            and self._tried.get(at) != len(self.cache.weights)
        ):
            self._tried[at] = len(self.cache.weights)
            with self._lock:
                found = self._make_table(at)
            if found is not None:
                self._tables[at] = found
        return found

    def note_use(self, table: ExpertTable, used: Sequence[int], num_rows: int) -> None:
        """Counts as one call what was computed elsewhere with a table. used: numbers of the experts."""
        with self._lock:
            self._count_served()
            self._count_use((table.keys[0].component, table.keys[0].layer), used, num_rows)

    def _make_table(self, at: tuple[str, int]) -> ExpertTable | None:
        keys = self._keys_of.get(at, [])
        weights = self.cache.for_good(keys)
        if weights is None or [key.expert for key in keys] != list(range(len(keys))):
            return None
        experts = [expert.native for expert in weights if expert.native is not None]
        return ExpertTable.of(keys, experts) if len(experts) == len(keys) else None

    def _compute_waves(self, call: ExpertCall, keys: list[ExpertKey]) -> Tensor:
        for key in keys:
            if not self._answers_for(key):
                raise NotInGroup(str(tuple(key)))
            self._store.record(key)
        self._count_step((call.component, call.layer))
        try:
            parts = [self._compute_wave(call, wave, keys) for wave in self.cache.waves(keys)]
        finally:
            self.cache.let_guests_go(keys)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        """Begin to read what the next call may ask for, likeliest first. See `ExpertCache.prefetch`.

        Raises UnknownExpert.
        """
        keys = [key for expert in experts if self._is_for(key := ExpertKey(component, layer, expert))]
        for key in keys:
            self._store.record(key)
        with self._lock:
            self._count_served()
            if self.desk is not None:  # a guess that comes true is counted when it is used
                self.desk.close()
            self.cache.prefetch(keys)

    def load_all(self) -> None:
        """Read as much of the group as the budget holds, so that the first requests find it."""
        for first in range(0, len(self._keys), LOAD_THREADS):
            wanted = self._keys[first : first + LOAD_THREADS]
            with self._lock:
                self._count_served()
                part = self.cache.first_that_fit(wanted)
                for _ in self.cache.bring(part, self._now):
                    pass
            if len(part) < len(wanted):
                return

    def load_more(self) -> bool:
        """Read one more expert that will stay for good; False where there is none to read. What cannot be read is left
        to whoever asks for it.

        Once all of a layer are there, `table` has them.
        """
        with self._lock:
            for key in self._unread:
                try:
                    if self.cache.read_ahead(key, self._now):
                        return True
                except ExpertError:
                    continue
                except (OSError, MemoryError) as error:
                    logger.warning("no further experts are read before they are asked for: %s", error)
                    return False
        return False

    def close(self) -> None:
        """Ends the loading threads; the store belongs to the caller."""
        self.cache.close()

    def _is_for(self, key: ExpertKey) -> bool:
        return key.component in self.widths and (self._group is None or key in self._group)

    def _answers_for(self, key: ExpertKey) -> bool:
        return self._is_for(key) or (self._has_guests and key.component in self.widths)

    def _count_use(self, layer: tuple[str, int], experts: Sequence[int], num_rows: int) -> None:
        """A call that was computed, for experts that are all in memory."""
        self._count_step(layer)
        self.cache.note_uses(layer, experts, self._now)
        self._used[layer].update(experts)
        self._stats.calls += 1
        self._stats.rows += num_rows

    def _count_served(self) -> None:
        """Before anything is decided by who was used. Under the lock."""
        if self.desk is not None:
            for use in self.desk.take_uses():
                self._count_use(*use)

    def _count_step(self, layer: tuple[str, int]) -> None:
        """Time for evictions: how often the layer that was called most often was called."""
        self._steps[layer] = count = self._steps.get(layer, 0) + 1
        self._now = max(self._now, count)

    def _compute_wave(self, call: ExpertCall, wave: range, keys: list[ExpertKey]) -> Tensor:
        wave_keys = keys[wave.start : wave.stop]
        self._used[call.component, call.layer].update([key.expert for key in wave_keys])
        part = call if len(wave_keys) == len(keys) else _restrict(call, wave)
        rows_RD: Tensor | None = None
        index_of = {key: index for index, key in enumerate(wave_keys)}
        with closing(self.cache.bring(wave_keys, self._now)) as arrivals:
            for ready in arrivals:
                if len(ready) == len(wave_keys):
                    rows_RD = self._compute(part, ready)
                elif ready:
                    if rows_RD is None:
                        rows_RD = call.tokens_TD.new_empty(part.num_rows, call.tokens_TD.shape[1])
                    self._compute_some(part, [index_of[key] for key in ready], ready, rows_RD)
        assert rows_RD is not None
        return rows_RD

    def _compute(self, call: ExpertCall, keys: Sequence[ExpertKey]) -> Tensor:
        return compute_experts(call, [self.cache.weights[key] for key in keys], self._kernel)

    def _compute_some(
        self, call: ExpertCall, indices: list[int], keys: Sequence[ExpertKey], rows_RD: Tensor
    ) -> None:
        """Write the rows of some of the call's experts where they belong."""
        starts = [0, *accumulate(call.counts)]
        some_RD = self._compute(_restrict(call, indices), keys)
        first = 0
        for index in indices:
            rows_RD[starts[index] : starts[index + 1]] = some_RD[first : first + call.counts[index]]
            first += call.counts[index]


def _restrict(call: ExpertCall, indices: Sequence[int]) -> ExpertCall:
    """The part of a call that asks for the experts at these indices, ascending."""
    starts = [0, *accumulate(call.counts)]
    return ExpertCall(
        call.component,
        call.layer,
        tuple(call.experts[index] for index in indices),
        tuple(call.counts[index] for index in indices),
        tuple(token for i in indices for token in call.token_of_R[starts[i] : starts[i + 1]]),
        call.tokens_TD,
        call.request_id,
    )
