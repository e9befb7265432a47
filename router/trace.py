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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from router.dispatch import Dispatch
from router.errors import TraceFailed
from router.scoring import Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner
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


class RoutingTrace(RoutingWatcher):
    """A `RoutingWatcher` that writes a file or, for a folder, parts of at most PART_ROWS rows."""

    def __init__(self, facts: TraceFacts, paths: Iterator[Path], *, has_parts: bool) -> None:
        """Raises TraceFailed where the first file cannot be opened."""
        self._facts, self._paths, self._has_parts = facts, paths, has_parts
        self._failure: TraceFailed | None = None
        self._pending: list[RoutedLayer] = []
        self._num_pending = 0
        self._is_closing = False
        self._is_kept = True
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
        if self._failure is not None or self._is_closing:
            return
        routed = RoutedLayer(owners, gate.layer, routing)
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._pending.append(routed)
            self._num_pending += routed.num_rows
            if self._num_pending >= GROUP_ROWS:
                self._changed.notify_all()

    def close(self, *, is_kept: bool = True) -> None:
        """Write what waits and give the file its name; or, where it is not to be kept, leave nothing of it.

        Raises TraceFailed for any failure since the start. May be called again.
        """
        with self._changed:
            self._is_closing, self._is_kept = True, is_kept
            self._changed.notify_all()
        self._thread.join()
        if self._failure is not None and is_kept:
            raise self._failure

    def _has_room(self) -> bool:
        return self._num_pending < MAX_PENDING_ROWS or self._failure is not None

    def _run(self) -> None:
        while not self._is_closing and self._failure is None:
            self._attempt(self._write_pending)
        self._attempt(self._finish)
        with self._changed:
            self._pending.clear()
            self._changed.notify_all()

    def _attempt(self, work: Callable[[], None]) -> None:
        if self._failure is not None:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine must not wait for a thread that is gone
            path = str(self._file.path if self._file is not None else "")
            self._failure = error if isinstance(error, TraceFailed) else TraceFailed(path, _reason(error))
            logger.error("%s; no more is traced", self._failure)
            if self._file is not None:
                self._file.discard()

    def _write_pending(self) -> None:
        """Wait for a row group's worth, or until a part has its age, and write it."""
        with self._changed:
            timeout_s = self._part_due_s() if self._has_parts else None
            self._changed.wait_for(lambda: self._is_closing or self._num_pending >= GROUP_ROWS, timeout_s)
            pending, self._pending = self._pending, []
            self._num_pending = 0
            self._changed.notify_all()
        if pending:
            self._write(pending)
        is_due = self._file is not None and self._file.num_rows >= PART_ROWS
        if self._has_parts and (is_due or self._part_due_s() <= 0.0):
            self._finish()

    def _write(self, pending: list[RoutedLayer]) -> None:
        if self._file is None:
            self._file = TraceFile(next(self._paths), self._facts)
            self._opened_at = time.monotonic()
        for rows in to_batches(pending, has_tokens=self._facts.has_tokens):
            self._file.write(rows)

    def _part_due_s(self) -> float:
        """Seconds until the open part is old enough; a new age begins where there is nothing in it."""
        now = time.monotonic()
        if self._file is None or not (self._file.num_rows or self._num_pending):
            self._opened_at = now
        return self._opened_at + PART_AGE_S - now

    def _finish(self) -> None:
        """An empty part is none; an empty file says that nothing was computed."""
        if self._pending:
            pending, self._pending = self._pending, []
            self._write(pending)
        file = self._file
        if file is None:
            return
        if not self._is_kept or (self._has_parts and not file.num_rows):
            file.discard()
        else:
            file.finish()
        self._file = None  # not before: what cannot be finished is to be named and discarded


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def to_batches(routed: Sequence[RoutedLayer], *, has_tokens: bool) -> Iterator[pa.RecordBatch]:
    """Rows of a trace, in the order in which they were routed, at most GROUP_ROWS and one step's layer at a time."""
    group: list[RoutedLayer] = []
    num_rows = 0
    for layer in routed:
        group.append(layer)
        num_rows += layer.num_rows
        if num_rows >= GROUP_ROWS:
            yield _to_batch(group, has_tokens=has_tokens)
            group, num_rows = [], 0
    if group:
        yield _to_batch(group, has_tokens=has_tokens)


def _to_batch(routed: Sequence[RoutedLayer], *, has_tokens: bool) -> pa.RecordBatch:
    """One conversion for each layer of a step, none for each token."""
    steps: dict[int, _StepColumns] = {}
    for layer in routed:
        if id(layer.owners) not in steps:
            steps[id(layer.owners)] = _StepColumns.of(layer.owners, has_tokens=has_tokens)
    of_layers = [steps[id(layer.owners)] for layer in routed]
    requests = pa.chunked_array([step.requests for step in of_layers]).combine_chunks()
    positions = np.concatenate([step.positions for step in of_layers])
    counts = [layer.num_rows for layer in routed]
    layers = np.repeat(np.array([layer.layer for layer in routed], dtype=np.int16), counts)
    experts = [layer.routing.experts_TK.cpu().numpy() for layer in routed]
    is_used = [rows >= 0 for rows in experts]  # a token may have fewer experts than its neighbours
    lengths = np.concatenate([used.sum(axis=1) for used in is_used])
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    chosen = np.concatenate([rows[used] for rows, used in zip(experts, is_used, strict=True)])
    weights = [layer.routing.weights_TK.float().cpu().numpy() for layer in routed]
    mixed = np.concatenate([rows[used] for rows, used in zip(weights, is_used, strict=True)])
    schema = trace_schema(has_tokens=has_tokens)
    columns = [
        requests,
        pa.array(positions),
        pa.array(layers),
        pa.ListArray.from_arrays(
            offsets, pa.array(chosen.astype(np.int16)), type=schema.field("experts").type
        ),
        pa.ListArray.from_arrays(offsets, pa.array(mixed), type=schema.field("weights").type),
    ]
    if has_tokens:
        columns.append(pa.array(np.concatenate([step.tokens for step in of_layers])))
    return pa.record_batch(columns, schema=schema)


@dataclass(frozen=True)
class _StepColumns:
    """Whose the rows of a step are; the same for all of its layers."""

    requests: pa.StringArray
    positions: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, owners: Sequence[SpanOwner], *, has_tokens: bool) -> _StepColumns:
        counts = [owner.count for owner in owners]
        names = pa.array([owner.request.request_id for owner in owners], pa.string())
        spans = [np.arange(owner.first, owner.first + owner.count, dtype=np.int32) for owner in owners]
        texts = [owner.tokens[owner.first : owner.first + owner.count] for owner in owners]
        tokens = (
            np.concatenate([np.array(text, dtype=np.int32) for text in texts]) if has_tokens else np.empty(0)
        )
        return cls(
            names.take(pa.array(np.repeat(np.arange(len(owners)), counts))), np.concatenate(spans), tokens
        )
