"""Which record is fetched next: what somebody waits for, then what is wanted ahead, in order. Pure.

Called by `experts.record_fetcher` under its lock.
"""

from __future__ import annotations

from collections.abc import Iterable

from extraction.manifest import ExpertKey


class FetchQueue:
    """Every key is under way at most once. Time comes from the caller, in seconds."""

    def __init__(self) -> None:
        self._urgent: dict[ExpertKey, None] = {}
        self._wanted: dict[ExpertKey, float] = {}
        """In the order in which they are fetched, and from when on each may be."""
        self._under_way: set[ExpertKey] = set()
        self._paused_until_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Nothing is wanted ahead, waited for or under way."""
        return not (self._wanted or self._urgent or self._under_way)

    def want(self, keys: Iterable[ExpertKey]) -> None:
        """Fetch these when nobody waits for anything else."""
        for key in keys:
            self._wanted.setdefault(key, 0.0)

    def urge(self, key: ExpertKey) -> None:
        """Somebody waits for this one."""
        if key not in self._under_way:
            self._urgent[key] = None

    def take(self, now_s: float) -> ExpertKey | None:
        """The next one, which is then under way until `done` or `failed`. None where nothing may be fetched now."""
        key = next(iter(self._urgent), None)
        if key is None:
            ready = (
                key for key, at_s in self._wanted.items() if at_s <= now_s and key not in self._under_way
            )
            key = next(ready, None) if now_s >= self._paused_until_s else None
        if key is not None:
            self._urgent.pop(key, None)
            self._under_way.add(key)
        return key

    def done(self, key: ExpertKey) -> None:
        self._under_way.discard(key)
        self._urgent.pop(key, None)
        self._wanted.pop(key, None)

    def failed(self, key: ExpertKey, retry_at_s: float) -> None:
        """What was wanted ahead is tried again later, after the others."""
        self._under_way.discard(key)
        self._urgent.pop(key, None)
        if self._wanted.pop(key, None) is not None:
            self._wanted[key] = retry_at_s

    def pause(self, until_s: float) -> None:
        """Until then only what somebody waits for is fetched: the reason of a failure concerns every key."""
        self._paused_until_s = until_s

    def wait_s(self, now_s: float) -> float | None:
        """How long until `take` has something; None where only a new wish can bring it."""
        times = [at_s for key, at_s in self._wanted.items() if key not in self._under_way]
        return max(0.0, max(min(times), self._paused_until_s) - now_s) if times else None
