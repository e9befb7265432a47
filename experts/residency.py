"""Which experts stay in memory: decisions only, no weights. Called by `experts.worker`.

`Residency` keeps the books of one byte budget: what is resident, in order of last use, and what has to go when
something else must come in. It never exceeds its budget and never lets go of an expert that the same wave needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from experts.errors import BudgetTooSmall
from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class Exchange:
    """What must happen before a wave can be computed."""

    evict: tuple[ExpertKey, ...]
    load: tuple[ExpertKey, ...]


class Residency:
    """Least recently used goes first. Every operation is O(1) per expert it moves.

    Not safe for several threads at once.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        """budget_bytes: None means that everything may stay."""
        self.budget_bytes = budget_bytes
        self.resident_bytes = 0
        self._sizes: OrderedDict[ExpertKey, int] = OrderedDict()
        self._of_layer: dict[tuple[str, int], set[int]] = {}

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def of_layer(self, component: str, layer: int) -> frozenset[int]:
        """Numbers of the resident experts of one layer. May be called while another thread admits."""
        return frozenset(self._of_layer.get((component, layer), ()))

    def waves(self, sizes: Sequence[int]) -> list[range]:
        """Split experts of these sizes, in order, into runs that each fit the budget.

        Raises BudgetTooSmall when one expert alone does not fit.
        """
        if self.budget_bytes is None:
            return [range(len(sizes))]
        waves: list[range] = []
        start = 0
        held = 0
        for index, nbytes in enumerate(sizes):
            if nbytes > self.budget_bytes:
                raise BudgetTooSmall(self.budget_bytes, nbytes)
            if held + nbytes > self.budget_bytes:
                waves.append(range(start, index))
                start, held = index, 0
            held += nbytes
        waves.append(range(start, len(sizes)))
        return waves

    def admit(self, wave: Sequence[ExpertKey], sizes: Sequence[int]) -> Exchange:
        """Make room for one wave and count all of it as used now.

        The caller carries out the exchange, evictions first. A wave must be one that `waves` returned.
        """
        load = []
        needed = 0
        for key, nbytes in zip(wave, sizes, strict=True):
            if key in self._sizes:
                self._sizes.move_to_end(key)
            else:
                load.append((key, nbytes))
                needed += nbytes
        evict = self._make_room(needed)
        for key, nbytes in load:
            self._sizes[key] = nbytes
            self._of_layer.setdefault((key.component, key.layer), set()).add(key.expert)
        self.resident_bytes += needed
        return Exchange(tuple(evict), tuple(key for key, _ in load))

    def forget(self, key: ExpertKey) -> None:
        """Take back an admission whose load failed."""
        self.resident_bytes -= self._sizes.pop(key)
        self._of_layer[key.component, key.layer].discard(key.expert)

    def _make_room(self, needed: int) -> list[ExpertKey]:
        evict = []
        while self.budget_bytes is not None and self.resident_bytes + needed > self.budget_bytes:
            key, nbytes = self._sizes.popitem(last=False)
            self.resident_bytes -= nbytes
            self._of_layer[key.component, key.layer].discard(key.expert)
            evict.append(key)
        return evict
