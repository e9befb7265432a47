"""Loads expert records into buffers: several at once, past the page cache where asked for, from copies if need be.

Reading happens on threads of its own, which wait for the disk outside the interpreter's lock, so that the experts
that are there already are computed meanwhile. Called by `experts.worker`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from experts.errors import ExpertCorrupt, StoreDamaged
from experts.store import ExpertStore
from extraction.manifest import ExpertKey

logger = logging.getLogger(__name__)

LOAD_THREADS = 4
"""Reads in flight. Two keep a solid-state disk busy with records of 9 MiB; past the page cache all four together take
about a tenth of one core."""
MIN_PARALLEL_BYTES = 1 << 20
"""Smaller records are read where they are needed: handing one to a thread takes longer than reading it from the page
cache, and blocks read beside it would be a good part of it."""


class ExpertLoader:
    """Reads records of one store, and of its copies where the store fails. Safe for several threads."""

    def __init__(self, store: ExpertStore, *, direct: bool = False, copies: Sequence[Path] = ()) -> None:
        """direct: pass the page cache by. copies: folders with the same store, perhaps on other disks.

        Raises StoreDamaged for a folder that holds another store.
        """
        self.direct = direct
        self._store = store
        self._copies = [_open_copy(path, store) for path in copies]
        self._threads = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="expert-load")

    def window_bytes(self, key: ExpertKey) -> int:
        """See `ExpertStore.window_bytes`."""
        return self._store.window_bytes(key, direct=self.direct)

    def load(self, key: ExpertKey, window: Tensor) -> Tensor:
        """Read a record; returns the part of the window that holds it. See `ExpertStore.read_into`.

        A record that fails is read once more, then from each copy. Raises what the store raised first.
        """
        first: ExpertCorrupt | StoreDamaged | None = None
        for store in (self._store, self._store, *self._copies):
            try:
                return store.read_into(key, window, direct=self.direct)
            except (ExpertCorrupt, StoreDamaged) as error:
                logger.warning("cannot load from %s: %s", store.root, error)
                first = first or error
        assert first is not None
        raise first

    def start(self, key: ExpertKey, window: Tensor) -> Future[Tensor]:
        """`load` on another thread. The window belongs to it until the future is done."""
        return self._threads.submit(self._load_beside, key, window)

    def close(self) -> None:
        """Ends the threads and closes the copies; the store belongs to the caller."""
        self._threads.shutdown()
        for copy in self._copies:
            copy.close()

    @torch.inference_mode()
    def _load_beside(self, key: ExpertKey, window: Tensor) -> Tensor:
        """Inference mode belongs to a thread, and views of what another thread made in it may need it."""
        return self.load(key, window)


def check_copies(store: ExpertStore, copies: Sequence[Path]) -> None:
    """Raises StoreDamaged for a folder that holds another store, or what opening one raises."""
    for path in copies:
        _open_copy(path, store).close()


def _open_copy(path: Path, store: ExpertStore) -> ExpertStore:
    copy = ExpertStore.open(path)
    if copy.hash != store.hash:
        copy.close()
        raise StoreDamaged(str(path), f"is no copy of {store.root}: it holds another store")
    return copy
