"""What every eviction would have hit with the same traffic: caches that hold names and no weights.

They answer which eviction suits a service without trying it on its users. Where the budget holds many experts, they
follow only a fixed quarter of the experts, with a quarter of the budget: what is measured then is how evictions differ,
and that is added to what the real cache has hit. Called by `experts.worker`.

Source of the sampling: C. Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from experts.eviction import EVICTIONS, Eviction, EvictionOrder, make_worth
from extraction.manifest import ExpertKey

SAMPLED_FROM = 256
"""Experts in the budget from which on only a part is followed."""
SAMPLE_ONE_IN = 4


class _Shadow:
    """One cache without books for anybody but itself: decides as `Residency` does, at half its cost."""

    def __init__(self, budget_bytes: int, order: EvictionOrder) -> None:
        self.misses = 0
        self._budget_bytes = self._free_bytes = budget_bytes
        self._order = order
        self._sizes: dict[ExpertKey, int] = {}

    def use(self, wave: Sequence[ExpertKey], sizes: Sequence[int], now: float) -> None:
        """A wave that fits the budget."""
        self._order.visit(wave, now)
        missing = [(key, nbytes) for key, nbytes in zip(wave, sizes, strict=True) if key not in self._sizes]
        if missing:
            self.misses += len(missing)
            self._make_room(sum(nbytes for _, nbytes in missing), wave)
            self._sizes.update(missing)
        for key, nbytes in zip(wave, sizes, strict=True):
            self._order.use(key, nbytes, now)

    def set_budget(self, budget_bytes: int) -> None:
        self._free_bytes += budget_bytes - self._budget_bytes
        self._budget_bytes = budget_bytes
        self._make_room(0, ())

    def _make_room(self, needed: int, wave: Sequence[ExpertKey]) -> None:
        self._free_bytes -= needed
        if self._free_bytes < 0:
            with closing(self._order.going(frozenset(wave))) as going:
                while self._free_bytes < 0:
                    self._free_bytes += self._sizes.pop(next(going))


class ShadowCaches:
    """One cache for each eviction but the one in use; with a sample, for that one too."""

    def __init__(
        self,
        budget_bytes: int,
        expert_bytes: int,
        in_use: Eviction,
        trust: Callable[[ExpertKey], float] | None = None,
    ) -> None:
        """expert_bytes: size of the largest expert."""
        is_sampled = budget_bytes >= SAMPLED_FROM * expert_bytes
        self._in_use = in_use
        self._expert_bytes = expert_bytes
        self._one_in = SAMPLE_ONE_IN if is_sampled else 1
        self._budget_bytes = budget_bytes // self._one_in
        self._caches = {
            eviction: _Shadow(self._budget_bytes, EvictionOrder(make_worth(eviction, trust)))
            for eviction in EVICTIONS
            if is_sampled or eviction != in_use
        }
        self._uses = 0
        self._is_followed: dict[ExpertKey, bool] = {}

    def use(self, wave: Sequence[ExpertKey], sizes: Sequence[int], now: float) -> None:
        """The same wave that the real cache admits."""
        if self._one_in > 1:
            indices = [index for index, key in enumerate(wave) if self._follows(key)]
            wave, sizes = [wave[index] for index in indices], [sizes[index] for index in indices]
        self._uses += len(wave)
        fits = sum(sizes) <= self._budget_bytes
        parts = [range(len(wave))] if fits else [range(index, index + 1) for index in range(len(wave))]
        for cache in self._caches.values():
            for part in parts:
                cache.use(wave[part.start : part.stop], sizes[part.start : part.stop], now)

    def set_budget(self, budget_bytes: int) -> None:
        """Follow the real cache, whose budget has become another; a sample keeps to at least one expert."""
        self._budget_bytes = max(budget_bytes // self._one_in, self._expert_bytes)
        for cache in self._caches.values():
            cache.set_budget(self._budget_bytes)

    def hit_rates(self, uses: int, hits: int) -> dict[Eviction, float]:
        """By eviction, best first. uses, hits: of the real cache. Empty before anything was followed."""
        if not uses or not self._uses:
            return {}
        real = hits / uses
        shadow = {eviction: 1.0 - cache.misses / self._uses for eviction, cache in self._caches.items()}
        offset = real - shadow[self._in_use] if self._in_use in shadow else 0.0
        rates = {eviction: min(1.0, max(0.0, rate + offset)) for eviction, rate in shadow.items()}
        rates[self._in_use] = real
        return dict(sorted(rates.items(), key=lambda item: (-item[1], item[0])))

    def _follows(self, key: ExpertKey) -> bool:
        found = self._is_followed.get(key)
        if found is None:
            found = self._is_followed[key] = _mixed(key) % self._one_in == 0
        return found


def _mixed(key: ExpertKey) -> int:
    """A number that looks random and is the same in every process, unlike a text's hash."""
    number = (key.layer << 20 | key.expert) + sum(key.component.encode())
    number = (number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    return number >> 40
