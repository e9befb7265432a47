"""Trust of a group's experts in a process that learns none: scores as the ledger's owner told them last. Pure.

The owner hands down one number an expert, in the order of the group; `cluster.supervisor` does so for expert actors,
whose evictions and shadow caches read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from experts.errors import TrustMismatch
from experts.trust import UNSEEN, TrustSettings, TrustTable, trust_scores
from extraction.manifest import ExpertKey

Scores = npt.NDArray[np.float32]

HAND_DOWN_INTERVAL_S = 5.0
"""Least time between two tellings of an actor: routers report as often."""


def group_scores(table: TrustTable, settings: TrustSettings, group: Sequence[ExpertKey]) -> Scores:
    """(G,) float32 in [0, 1], in the group's order; `UNSEEN` for experts that the table is not about."""
    scores_LE = trust_scores(table, settings)
    row_of = {layer: row for row, layer in enumerate(table.layers)}
    scores_G = np.full(len(group), UNSEEN, np.float32)
    for index, key in enumerate(group):
        row = row_of.get(key.layer)
        if key.component == table.component and row is not None and key.expert < table.num_experts:
            scores_G[index] = scores_LE[row, key.expert]
    return scores_G


class GroupTrust:
    """Told on one thread, read on any."""

    def __init__(self, group: Sequence[ExpertKey]) -> None:
        self._group = tuple(group)
        self._scores: dict[ExpertKey, float] = {}

    def tell(self, scores_G: Scores) -> None:
        """Replace all scores at once. Raises TrustMismatch for another number of experts, or what is no score."""
        if scores_G.shape != (len(self._group),):
            raise TrustMismatch(f"{len(self._group)} experts", f"scores of shape {scores_G.shape}")
        if not ((scores_G >= 0) & (scores_G <= 1)).all():
            raise TrustMismatch("scores from 0 to 1", "scores that are out of range")
        self._scores = dict(zip(self._group, scores_G.tolist(), strict=True))

    @property
    def num_known(self) -> int:
        """Experts whose score is another than that of an unseen one."""
        return sum(score != UNSEEN for score in self._scores.values())

    def score(self, key: ExpertKey) -> float:
        """In [0, 1]; `UNSEEN` before anything was told."""
        return self._scores.get(key, UNSEEN)


class HandDown:
    """When an actor is due to be told again: what it knows is old, and it was not told a moment ago."""

    def __init__(self, interval_s: float = HAND_DOWN_INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._told: dict[str, tuple[int, int, float]] = {}
        """By actor: its incarnation, the tokens that the table had seen, and when."""

    def is_due(self, name: str, incarnation: int, num_tokens: int, now_s: float) -> bool:
        told = self._told.get(name)
        if told is None or told[0] != incarnation:
            return True
        return told[1] != num_tokens and now_s - told[2] >= self._interval_s

    def note(self, name: str, incarnation: int, num_tokens: int, now_s: float) -> None:
        self._told[name] = (incarnation, num_tokens, now_s)
