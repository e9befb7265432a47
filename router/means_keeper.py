"""Keeps mean outputs from one start of a service to the next, on a thread of its own.

Stand-ins are advice: when they cannot be kept, the log says so and nothing else stops. Several routers of one store
write one file, each on its own; the last one wins, since all of them estimate the same means.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.store import ExpertStore
from router.errors import MeansDamaged, MeansUnusable
from router.means_file import MeansIdentity, means_path, read_means, set_aside, write_means
from router.output_means import HALF_LIFE_USES, MIN_USES, LayerMeans, OutputMeans

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 5.0


@dataclass(frozen=True)
class StandInOptions:
    """That mean outputs may stand in for absent experts, where the snarc weights let them."""

    state_folder: str | None = None
    """Where they are kept; None means that they are forgotten at the end."""


def is_due(num_learned: int, num_saved: int, num_experts: int) -> bool:
    """Whether to save: when a quarter more was learned, but not before MIN_USES an expert are new, and at the latest
    when HALF_LIFE_USES are. num_learned, num_saved: rows so far, and when it was last saved."""
    new_uses = (num_learned - num_saved) / num_experts
    return new_uses >= min(max(num_saved / num_experts / 4, MIN_USES), HALF_LIFE_USES)


class MeansKeeper:
    """Gives the means what is kept when it is made, and saves them from then on until `close`."""

    def __init__(
        self, means: OutputMeans, identity: MeansIdentity, path: Path, interval_s: float = LOOK_INTERVAL_S
    ) -> None:
        """Where the file is damaged or cannot be read, the log says so, and means are learned anew."""
        self._means, self._identity, self._path, self._interval_s = means, identity, path, interval_s
        self._num_saved = 0
        self._failure: str | None = None
        self._restore()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stand-ins", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Save what was learned last."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join()

    def status(self) -> dict[str, Any]:
        """Plain values for people."""
        return {
            "is_kept": self._failure is None,
            "path": str(self._path),
            "experts_known": self._means.num_known,
            "nbytes": self._means.nbytes,
        }

    def _restore(self) -> None:
        try:
            kept = self._read()
        except MeansUnusable as error:
            self._fail(error)
            return
        for layer, means in kept.items():
            self._means.restore(layer, means)

    def _read(self) -> dict[int, LayerMeans]:
        try:
            return read_means(self._path, self._identity)
        except MeansDamaged as error:
            logger.warning("%s: kept as %s, learning anew", error, set_aside(self._path))
            return {}

    def _run(self) -> None:
        num_experts = len(self._identity.layers) * self._identity.num_experts
        while not self._closing.wait(self._interval_s):
            if is_due(self._means.num_learned, self._num_saved, num_experts):
                self._save()
        if self._means.num_learned > self._num_saved:
            self._save()

    def _save(self) -> None:
        num_learned = self._means.num_learned
        try:
            if write_means(self._path, self._identity, self._means.copy):
                self._num_saved, self._failure = num_learned, None
        except MeansUnusable as error:
            self._fail(error)

    def _fail(self, error: MeansUnusable) -> None:
        if self._failure is None:
            logger.warning("stand-ins are learned but not kept for now: %s", error)
        self._failure = str(error)


def keep_means(means: OutputMeans, store: ExpertStore, state_folder: str) -> MeansKeeper:
    """means: of the store's served component, which has experts."""
    name = store.served.name
    dtype = store.record(store.expert_keys(name)[0]).dtype
    identity = MeansIdentity(store.hash, dtype, name, means.layers, means.num_experts, means.width)
    return MeansKeeper(means, identity, means_path(Path(state_folder), store.hash))
