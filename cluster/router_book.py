"""What the supervisor knows of the routers: which roster each follows, its load, and what it asks of experts. Pure.

A router that has not been heard for a while is forgotten: it must not hold up a drain for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from cluster.capacity import Load
from extraction.manifest import ExpertKey

if TYPE_CHECKING:
    from router.expert_use import Use

FORGET_AFTER_S = 10.0


@dataclass(frozen=True)
class RouterLoad:
    """What a router has to do at a moment, and what was asked of experts since its last report."""

    load: Load
    use: Use = field(default_factory=dict)


@dataclass
class _Router:
    version: int
    heard_at_s: float
    load: Load | None = None
    share: Fraction | None = None


class RouterBook:
    """Not safe for several threads."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}
        self._use: Use = {}

    def follows(self, router: str, version: int, share: Fraction | None, now_s: float) -> None:
        """A router has carried out this version of the roster, and wants actors to keep this share of their group in
        memory; None where it has no wish."""
        entry = self._routers.setdefault(router, _Router(version, now_s))
        entry.version, entry.heard_at_s, entry.share = max(version, entry.version), now_s, share

    def report(self, router: str, report: RouterLoad, now_s: float) -> None:
        entry = self._routers.setdefault(router, _Router(-1, now_s))
        entry.load, entry.heard_at_s = report.load, now_s
        for layer, counts_E in report.use.items():
            before_E = self._use.get(layer)
            self._use[layer] = counts_E if before_E is None else before_E + counts_E

    def excuse(self, seconds: float, now_s: float) -> None:
        """For so long nobody could be heard."""
        for entry in self._routers.values():
            entry.heard_at_s = min(now_s, entry.heard_at_s + seconds)

    def highest_version(self) -> int:
        """That any router follows; -1 without routers."""
        return max((entry.version for entry in self._routers.values()), default=-1)

    def all_follow(self, version: int, now_s: float) -> bool | None:
        """Whether every router follows this version or a later one; None where no router is known."""
        self._forget(now_s)
        if not self._routers:
            return None
        return all(entry.version >= version for entry in self._routers.values())

    def share(self) -> Fraction:
        """Of its group that an actor keeps: the most that any router wishes."""
        return max((e.share for e in self._routers.values() if e.share is not None), default=Fraction(1))

    def load(self, now_s: float) -> Load | None:
        """Of all routers together; None where none has told."""
        self._forget(now_s)
        loads = [entry.load for entry in self._routers.values() if entry.load is not None]
        if not loads:
            return None
        return Load(
            sum(load.num_running for load in loads),
            sum(load.num_waiting for load in loads),
            sum(load.max_running for load in loads),
        )

    def take_rows(self, groups: Mapping[str, Iterable[ExpertKey]]) -> dict[str, int]:
        """Rows asked of each group since the last taking."""
        use, self._use = self._use, {}
        rows = dict.fromkeys(groups, 0)
        for name, keys in groups.items():
            for key in keys:
                counts_E = use.get((key.component, key.layer))
                if counts_E is not None:
                    rows[name] += int(counts_E[key.expert])
        return rows

    def _forget(self, now_s: float) -> None:
        self._routers = {
            name: entry for name, entry in self._routers.items() if now_s - entry.heard_at_s < FORGET_AFTER_S
        }
