"""Trust as one process knows it: what the owner last said, and what has been observed here since.

Readers (eviction, scoring) and writers (the collector, the reporter) may be on different threads. Called by
`experts.residency` policies and `router.scoring` policies through `score` and `scores`.
"""

from __future__ import annotations

import threading
import uuid

import torch
from torch import Tensor

from experts.trust import UNSEEN, TrustReport, TrustSettings, TrustTable, empty_table, merged, trust_scores
from extraction.manifest import ExpertKey


class TrustBook:
    """Scores by expert. A reader sees them as of the last `add` or `settle`."""

    def __init__(self, base: TrustTable, settings: TrustSettings | None = None) -> None:
        """base: what is known already, from the owner's ledger, or an empty table."""
        self.settings = settings or TrustSettings()
        self._sender = uuid.uuid4().hex
        self._sequence = 0
        self._lock = threading.Lock()
        self._base = base
        self._sending: TrustTable | None = None
        self._unsent: TrustTable | None = None
        self._row_of_layer = {layer: row for row, layer in enumerate(base.layers)}
        self._refresh()

    def score(self, key: ExpertKey) -> float:
        """Trust in [0, 1]; 0.5 for an expert that was never seen or that this book is not about."""
        row = self._row_of_layer.get(key.layer)
        if key.component != self._base.component or row is None or not 0 <= key.expert < self.num_experts:
            return UNSEEN
        return self._scores[row][key.expert]

    def scores(self, component: str, layer: int) -> Tensor:
        """(E,) float32 trust of one layer's experts; not to be changed. Raises KeyError for a layer without experts."""
        if component != self._base.component:
            raise KeyError(component)
        return self._scores_LE[self._row_of_layer[layer]]

    @property
    def num_experts(self) -> int:
        """Of each layer."""
        return self._base.num_experts

    def view(self) -> TrustTable:
        """Everything that is known here."""
        with self._lock:
            return self._view

    def add(self, delta: TrustTable) -> None:
        """Count observations made in this process; the owner gets them with the next report."""
        with self._lock:
            self._unsent = delta if self._unsent is None else merged(self._unsent, delta, self.settings)
            self._refresh()

    def report(self) -> TrustReport | None:
        """What the owner lacks, or None. Until `settle` it stays the same report, so that sending it again is safe."""
        with self._lock:
            if self._sending is None:
                if self._unsent is None:
                    return None
                self._sending, self._unsent = self._unsent, None
                self._sequence += 1
            return TrustReport(self._sender, self._sequence, self._sending)

    def settle(self, base: TrustTable) -> None:
        """The owner has the last report; `base` is what it knows with it."""
        with self._lock:
            self._base, self._sending = base, None
            self._refresh()

    def _refresh(self) -> None:
        view = self._base
        for part in (self._sending, self._unsent):
            if part is not None:
                view = merged(view, part, self.settings)
        self._view = view
        scores_LE = trust_scores(view, self.settings)
        self._scores: list[list[float]] = scores_LE.tolist()
        self._scores_LE = torch.from_numpy(scores_LE).float()


def empty_book(
    component: str, layers: tuple[int, ...], num_experts: int, settings: TrustSettings | None = None
) -> TrustBook:
    """A book that knows nothing and is kept nowhere."""
    return TrustBook(empty_table(component, layers, num_experts), settings)
