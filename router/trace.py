"""Writes down which experts every token was given: `--trace`.

`RoutingTrace` is a watcher. On the engine's thread it only keeps references to what was routed; a thread of its own
turns them into rows and writes these. Memory is bounded: where the disk does not keep up, the engine waits. A single
file appears when it is closed, so a killed process leaves none; a folder gets parts, each of which appears whole, and
a killed process loses the last one alone.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from router.dispatch import Dispatch
from router.errors import TraceFailed
from router.scoring import Routing
from router.step_routing import GateOutput, SpanOwner
from router.trace_file import TraceFacts, TraceFile, trace_schema

logger = logging.getLogger(__name__)

GROUP_ROWS = 1 << 16
"""Rows of a row group."""
MAX_PENDING_ROWS = 4 * GROUP_ROWS
"""Rows that wait in memory, at 12 bytes an expert."""
PART_ROWS = 1 << 21
PART_AGE_S = 60.0
"""When a part of a folder is given its name."""


@dataclass(frozen=True)
class RoutedLayer:
    """What one layer of one step was given."""

    owners: Sequence[SpanOwner]
    layer: int
    routing: Routing

    @property
    def num_rows(self) -> int:
        return len(self.routing.experts_TK)


class RoutingTrace:
    """A `RoutingWatcher` that writes a file or, for a folder, parts of at most PART_ROWS rows."""

    def __init__(self, facts: TraceFacts, paths: Iterator[Path], *, has_parts: bool) -> None:
        """Raises TraceFailed where the first file cannot be opened."""
        self._facts, self._paths, self._has_parts = facts, paths, has_parts
        self._failure: TraceFailed | None = None
        self._pending: list[RoutedLayer] = []
        self._num_pending = 0
        self._is_closing = False
        self._changed = threading.Condition()
        self._file: TraceFile | None = TraceFile(next(paths), facts)
        self._opened_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="routing-trace", daemon=True)
        self._thread.start()

    @classmethod
    def to_file(cls, path: Path, facts: TraceFacts) -> RoutingTrace:
        return cls(facts, iter((path,)), has_parts=False)

    @classmethod
    def to_folder(cls, folder: Path, name: str, facts: TraceFacts) -> RoutingTrace:
        """Parts `NAME-000000.parquet`, `NAME-000001.parquet`, ..."""
        paths = (folder / f"{name}-{number:06}.parquet" for number in itertools.count())
        return cls(facts, paths, has_parts=True)

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        if self._failure is not None:
            return
        routed = RoutedLayer(owners, gate.layer, routing)
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._pending.append(routed)
            self._num_pending += routed.num_rows
            if self._num_pending >= GROUP_ROWS:
                self._changed.notify_all()

    def close(self, *, is_kept: bool = True) -> None:
        """Write what waits and give the file its name, or leave nothing of it. Raises TraceFailed for any failure
        since the start. May be called again."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._file is not None:
            if is_kept and self._failure is None and (self._file.num_rows or not self._has_parts):
                self._attempt(self._file.finish)
            if not is_kept or self._failure is not None or not self._file.num_rows:
                self._file.discard()
            self._file = None
        if self._failure is not None and is_kept:
            raise self._failure
