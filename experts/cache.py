"""The experts that are in memory: which, in what buffers, and how the others get there.

Puts together decisions (`experts.residency`), memory (`experts.buffers`) and reading (`experts.loader`). Large experts
arrive one by one, so that the caller can compute those that are there meanwhile, and may be read ahead of their use
(`experts.guessed_reads`). Used by `experts.worker`, under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from experts.buffers import PLAIN_MEMORY, BufferPool, HostMemory
from experts.eviction import DEFAULT_EVICTION, Eviction, make_worth
from experts.guessed_reads import MOST_READS, GuessedReads
from experts.loader import MIN_PARALLEL_BYTES, ExpertLoader
from experts.quantised import RecordForm
from experts.residency import Residency
from experts.shadow import ShadowCaches
from experts.store import ExpertStore
from experts.tier_books import TierBooks
from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class CacheOptions:
    """What stays in memory, and how the rest is read."""

    budget_bytes: int | None = None
    """For the experts and the buffers that they are read into; None means no bound."""
    eviction: Eviction = DEFAULT_EVICTION
    trust: Callable[[ExpertKey], float] | None = None
    """An expert's score in [0, 1], for the eviction of that name."""
    direct: bool | None = None
    """Whether to pass the page cache by, which would hold a second copy of what is read. None means where the experts
    exceed the budget and are large."""
    copies: tuple[Path, ...] = ()
    """Further folders of the same store, read where it fails."""
    memory: HostMemory = PLAIN_MEMORY
    """Where buffers come from."""
    is_resizable: bool = True
    """Whether `set_budget` may be called. A budget that holds everything and stays is no bound, which saves work."""


Held = TypeVar("Held")


class ExpertCache(Generic[Held]):
    """What experts' records became, by expert: weights, or records for a tier above. Not safe for several threads, but
    `resident` may be asked by any."""

    def __init__(
        self,
        store: ExpertStore,
        form: RecordForm[Held],
        keys: Collection[ExpertKey],
        options: CacheOptions,
        guests: Collection[ExpertKey] = (),
    ) -> None:
        """keys: the experts that it is for. form: what records become in memory. guests: further experts that may be
        asked for; they share the budget, or stay for one call where there is none."""
        self.weights: dict[ExpertKey, Held] = {}
        self._of_layer: dict[tuple[str, int], dict[int, Held]] = {}
        """The same, by layer and number."""
        self.hits = self.misses = self.bytes_read = 0
        self.on_change: Callable[[ExpertKey, Held | None], None] | None = None
        """Told of every expert that is there now, and of every one that is not before its memory is used again."""
        self._store, self._form = store, form
        stored = [store.record(key).nbytes for key in keys]
        budget = options.budget_bytes
        is_scarce = budget is not None and sum(stored) > budget
        is_large = bool(stored) and min(stored) >= MIN_PARALLEL_BYTES
        self._is_beside = is_large
        self._loader = ExpertLoader(
            store,
            direct=is_scarce and is_large if options.direct is None else options.direct,
            copies=options.copies,
        )
        self._can_guess = is_large and all(map(self._is_in_place, keys))
        self._guesses = GuessedReads(self._loader)
        self._held = {key: self._held_bytes(key) for key in (*keys, *guests)}
        self.group_bytes = sum(self._held[key] for key in keys)
        """Of all experts that it is for, in memory."""
        self.budget_bytes = budget
        holds_all = budget is not None and self.group_bytes <= budget and not guests
        bound = None if holds_all and not options.is_resizable else budget
        self._pool = BufferPool(bound, is_aligned=self._loader.direct, memory=options.memory)
        self._buffers: dict[ExpertKey, Tensor] = {}
        self._guests = frozenset(guests)
        self._residency = Residency(bound, make_worth(options.eviction, options.trust))
        largest = max(self._held.values(), default=0)
        self._shadows = None
        if budget is not None and self.group_bytes > budget:
            self._shadows = ShadowCaches(budget, largest, options.eviction, options.trust)
        self._books = TierBooks(self._residency, self._pool, self._shadows, budget, largest)

    def set_budget(self, budget_bytes: int) -> None:
        """Keep at most so many bytes from now on: at least one expert, at most the budget of the beginning. What is
        too much goes at once, and its memory with it. Raises ValueError where there never was a bound, or none was
        needed (`CacheOptions.is_resizable`)."""
        self.budget_bytes = budget_bytes = self._books.clamped(budget_bytes)
        self._books.set_budget(budget_bytes, self._drop)

    @property
    def _is_unbounded(self) -> bool:
        """Whether nothing that has come ever goes, but for guests."""
        return self._residency.budget_bytes is None

    @property
    def resident_bytes(self) -> int:
        """Of experts that are in memory or on their way, with what their buffers hold beside them."""
        return self._residency.resident_bytes

    @property
    def allocated_bytes(self) -> int:
        """Of all buffers, free ones too; never above the budget."""
        return self._pool.allocated_bytes

    @property
    def prefetched(self) -> tuple[int, int]:
        """Experts that were read by a guess, and how many of these were then needed. Both count among `bytes_read`; a
        use that a guess had come before is a miss all the same, since its expert was not there by earlier uses."""
        return self._guesses.begun, self._guesses.used

    def __len__(self) -> int:
        return len(self._residency)

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """Numbers of the experts of one layer that are in memory now."""
        return self._residency.of_layer(component, layer)

    def hit_rates(self) -> dict[Eviction, float]:
        """Share of uses that found their expert in memory, by eviction, best first.

        Measured for the eviction in use, and what the others would have had (`experts.shadow`). Empty where the
        budget holds everything.
        """
        return self._shadows.hit_rates(self.hits + self.misses, self.hits) if self._shadows else {}

    @property
    def is_counted_later(self) -> bool:
        """Whether uses may be told later by `note_uses`, as `at_hand` has it: no other eviction is followed."""
        return self._shadows is None

    def at_hand(self, layer: tuple[str, int], experts: Sequence[int]) -> list[Held] | None:
        """The weights of a layer's experts that are all there, where using them takes no more than `note_uses`: no
        guess is on its way or untried, and no other eviction is followed. None where it takes more. layer: component
        and number."""
        if self._shadows is not None or not self._guesses.is_idle:
            return None
        of_layer = self._of_layer.get(layer, {})
        try:
            return [of_layer[expert] for expert in experts]
        except KeyError:
            return None

    def note_uses(self, layer: tuple[str, int], experts: Sequence[int], now: float) -> None:
        """Count a use at step `now` of a layer's experts, which are there."""
        self.hits += len(experts)
        if not self._is_unbounded:
            keys = [ExpertKey(*layer, expert) for expert in experts]
            self._residency.use(keys, [self._held[key] for key in keys], now)

    def for_good(self, keys: Sequence[ExpertKey]) -> list[Held] | None:
        """The weights of experts that are all there and never go: without a bound, and no guests. Counts no use."""
        if not self._is_unbounded:
            return None
        if self._guests and not self._guests.isdisjoint(keys):
            return None
        found = [self.weights.get(key) for key in keys]
        return None if None in found else [weights for weights in found if weights is not None]

    def read_ahead(self, key: ExpertKey, now: float) -> bool:
        """Read an expert that nobody has asked for, which is no miss. False where it is there, on its way, or would not
        stay for good. Raises what reading the store raises."""
        if not self._is_unbounded or key in self._guests or key in self.weights or key in self._buffers:
            return False
        exchange = self._residency.admit((key,), (self._held[key],), now)
        for _ in self._load_here((key,), exchange.load):
            pass
        return True

    def waves(self, keys: Sequence[ExpertKey]) -> list[range]:
        """See `Residency.waves`."""
        return self._residency.waves([self._held[key] for key in keys])

    def first_that_fit(self, keys: Sequence[ExpertKey]) -> Sequence[ExpertKey]:
        """See `Residency.first_that_fit`."""
        return self._residency.first_that_fit(keys, [self._held[key] for key in keys])

    def bring(self, wave: Sequence[ExpertKey], now: float) -> Generator[Sequence[ExpertKey]]:
        """Make a wave's experts resident, as used at step `now`; yields them as they are there, each once.

        All at once where nothing is missing or experts are small; else first those that were there. Close the iterator
        when it is not run to its end. Raises what reading the store raises; what was loaded by then stays.
        """
        self._receive_guesses(wave)
        sizes = [self._held[key] for key in wave]
        exchange = self._residency.admit(wave, sizes, now)
        if self._shadows is not None:
            self._shadows.use(wave, sizes, now)
        for key in exchange.evict:
            self._drop(key)
        missing, under_way = exchange.load, self._guesses.claim(wave)
        num_misses = len(missing) + self._guesses.count_used(wave)
        self.hits += len(wave) - num_misses
        self.misses += num_misses
        if under_way or (missing and self._is_beside and all(map(self._is_in_place, missing))):
            return self._load_beside(wave, missing, under_way)
        return self._load_here(wave, missing)

    def prefetch(self, guess: Sequence[ExpertKey]) -> None:
        """Begin to read experts that may be needed next, likeliest first; waits for nothing.

        A hint, which changes no result: only large experts that are used as they are stored are read ahead, and none
        while a read of an earlier guess is under way, since the disk then has enough to do.
        """
        self._receive_guesses()
        if not self._can_guess or self._guesses.is_reading:
            return
        exchange = self._residency.expect(guess, [self._held[key] for key in guess], MOST_READS)
        for key in exchange.evict:
            self._drop(key)
        for key in exchange.load:
            self._buffers[key] = window = self._pool.take(self._held[key])
            self._guesses.begin(key, window)

    def let_guests_go(self, keys: Sequence[ExpertKey]) -> None:
        """After a call: without a bound nothing else would ever make them."""
        if self._is_unbounded:
            for key in self._guests.intersection(keys) & self.weights.keys():
                self._forget(key)

    def close(self) -> None:
        """Ends the loading threads; the store belongs to the caller."""
        self._guesses.cancel()
        self._loader.close()

    def _receive_guesses(self, wave: Sequence[ExpertKey] = ()) -> None:
        """Keep what has come; what is still queued and no part of the wave would only be in its way."""
        for key, raw in self._guesses.receive():
            if raw is None:
                self._forget(key)
            else:
                self._keep(key, raw)
        for key in self._guesses.cancel(wave):
            self._forget(key)

    def _load_here(
        self, wave: Sequence[ExpertKey], missing: Sequence[ExpertKey]
    ) -> Generator[Sequence[ExpertKey]]:
        left = list(missing)
        try:
            while left:
                self._load(left[0])
                left.pop(0)
        finally:
            for key in left:
                self._forget(key)
        yield wave

    def _load_beside(
        self,
        wave: Sequence[ExpertKey],
        missing: Sequence[ExpertKey],
        under_way: dict[Future[Tensor], ExpertKey],
    ) -> Generator[Sequence[ExpertKey]]:
        absent = frozenset((*missing, *under_way.values()))
        loads = dict(under_way)
        try:
            for key in missing:
                self._buffers[key] = window = self._pool.take(self._held[key])
                loads[self._loader.start(key, window)] = key
            yield [key for key in wave if key not in absent]
            while loads:
                done = wait(loads, return_when=FIRST_COMPLETED).done
                yield [self._place(loads, future) for future in sorted(done, key=loads.__getitem__)]
        finally:
            self._settle(loads, absent)

    def _place(self, loads: dict[Future[Tensor], ExpertKey], future: Future[Tensor]) -> ExpertKey:
        raw = future.result()
        key = loads.pop(future)
        self._keep(key, raw)
        return key

    def _settle(self, loads: dict[Future[Tensor], ExpertKey], absent: Collection[ExpertKey]) -> None:
        """After an error: wait until no thread writes to a buffer any more, and keep what came."""
        for future in wait(loads).done:
            if future.exception() is None:
                self._keep(loads[future], future.result())
        for key in absent:
            if key not in self.weights:
                self._forget(key)

    @torch.inference_mode()  # a buffer may have been made in it, and is then written in no other
    def _load(self, key: ExpertKey) -> None:
        """On this thread. A record that becomes something else is read into memory beside the budget."""
        if self._is_in_place(key):
            is_for_good = key not in self._guests
            window = self._buffers[key] = self._pool.take(self._held[key], is_for_good=is_for_good)
        else:
            window = BufferPool(None, is_aligned=self._loader.direct).take(self._loader.window_bytes(key))
        self._keep(key, self._loader.load(key, window))

    def _keep(self, key: ExpertKey, raw: Tensor) -> None:
        record = self._store.record(key)
        self.bytes_read += record.nbytes
        self.weights[key] = weights = self._form.weights(record, raw)
        self._of_layer.setdefault((key.component, key.layer), {})[key.expert] = weights
        if self.on_change is not None:
            self.on_change(key, weights)

    def _forget(self, key: ExpertKey) -> None:
        self._residency.forget(key)
        self._drop(key)

    def _drop(self, key: ExpertKey) -> None:
        if self._guesses.stop(key):
            self.bytes_read += self._store.record(key).nbytes
        if self.weights.pop(key, None) is not None:
            del self._of_layer[key.component, key.layer][key.expert]
            if self.on_change is not None:
                self.on_change(key, None)
        buffer = self._buffers.pop(key, None)
        if buffer is not None:
            self._pool.give(buffer)

    def _is_in_place(self, key: ExpertKey) -> bool:
        return self._form.is_in_place(self._store.record(key))

    def _held_bytes(self, key: ExpertKey) -> int:
        if self._is_in_place(key):
            return self._loader.window_bytes(key)
        return self._form.loaded_bytes(self._store.record(key))
