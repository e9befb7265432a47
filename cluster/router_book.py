"""What the supervisor knows of the routers: which roster each follows, its load, and what it asks of experts. Pure.

A router that has not been heard for a while is forgotten: it must not hold up a drain for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.capacity import Load
from extraction.manifest import ExpertKey

FORGET_AFTER_S = 10.0

Demand = Mapping[tuple[str, int], npt.NDArray[np.int64]]
"""(component, layer) -> (E,) rows that each expert was asked for, wherever they were computed."""


@dataclass(frozen=True)
class RouterLoad:
    """What a router has to do at a moment, and what was asked of experts since its last report."""

    load: Load
    demand: Demand = field(default_factory=dict)


@dataclass
class _Router:
    version: int
    heard_at_s: float
    load: Load | None = None


class RouterBook:
    """Not safe for several threads."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}
        self._demand: dict[tuple[str, int], npt.NDArray[np.int64]] = {}

    def follows(self, router: str, version: int, now_s: float) -> None:
        """A router has carried out this version of the roster."""
        entry = self._routers.setdefault(router, _Router(version, now_s))
        entry.version, entry.heard_at_s = max(version, entry.version), now_s

    def report(self, router: str, report: RouterLoad, now_s: float) -> None:
        entry = self._routers.setdefault(router, _Router(-1, now_s))
        entry.load, entry.heard_at_s = report.load, now_s
        for layer, counts_E in report.demand.items():
            before_E = self._demand.get(layer)
            self._demand[layer] = counts_E if before_E is None else before_E + counts_E

    def highest_version(self) -> int:
        """That any router follows; -1 without routers."""
        return max((entry.version for entry in self._routers.values()), default=-1)

    def all_follow(self, version: int, now_s: float) -> bool | None:
        """Whether every router follows this version or a later one; None where no router is known."""
        self._routers = {
            name: entry for name, entry in self._routers.items() if now_s - entry.heard_at_s < FORGET_AFTER_S
        }
        if not self._routers:
            return None
        return all(entry.version >= version for entry in self._routers.values())

    def load(self) -> Load | None:
        """Of all routers together; None where none has told."""
        loads = [entry.load for entry in self._routers.values() if entry.load is not None]
        if not loads:
            return None
        return Load(
            sum(load.num_running for load in loads),
            sum(load.num_waiting for load in loads),
            sum(load.max_running for load in loads),
        )

    def take_demand(self, groups: Mapping[str, Iterable[ExpertKey]]) -> dict[str, int]:
        """Rows asked of each group since the last taking."""
        demand, self._demand = self._demand, {}
        return {
            name: sum(
                int(counts_E[key.expert])
                for key in keys
                if (counts_E := demand.get((key.component, key.layer))) is not None
            )
            for name, keys in groups.items()
        }
