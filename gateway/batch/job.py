"""A batch from its start to its manifest: what there is to do, who does it, and what it came to.

Who does it is passed in: `gateway.batch.ray_shell` for the command, a worker in this process for tests and benchmarks.
Called by `gateway.batch.command`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.budget import BudgetRequest
from experts.store import ExpertStore
from gateway.batch.output import PartSummary, claimed
from gateway.batch.plan import NO_DEFAULTS, Part, RowDefaults, job_identity, pending_parts, store_identity
from gateway.batch.source import InputFile, plan_input
from gateway.batch.worker import BatchWorker, RowsEnded, WorkerSpec
from gateway.service.memory import BATCH_BASE, plan_engine
from router.loading import EngineOptions, stored_dtype

Compute = Callable[[WorkerSpec, Sequence[Part]], Generator[PartSummary | RowsEnded, None, None]]
"""Writes parts and tells of it as it goes."""
OnProgress = Callable[[int, int], None]
"""Called with the rows that have ended and the rows in all."""


@dataclass(frozen=True)
class BatchOptions:
    """What `sage-moe batch` was asked for."""

    store_root: Path
    model_name: str
    input: Path
    output: Path
    dtype: str | None = None
    defaults: RowDefaults = NO_DEFAULTS
    budgets: tuple[BudgetRequest, ...] = ()
    """Of experts; changes no answer, so a job may go on with another. Without any, no bound."""


@dataclass(frozen=True)
class BatchReport:
    """What a complete output holds."""

    num_parts: int
    ignored_columns: tuple[str, ...]
    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int


def run_batch(
    options: BatchOptions, compute: Compute, on_progress: OnProgress = lambda done, total: None
) -> BatchReport:
    """Compute what the output does not have yet, then write its manifest.

    Raises BatchInputInvalid, BatchOutputRefused, BatchFailed, or what reading the store raises.
    """
    planned = plan_input(options.input)
    spec, identity = _describe(options, planned)
    with claimed(options.output, identity, planned.parts) as folder:
        if folder.is_complete:
            totals = folder.read_totals()
        else:
            pending = pending_parts(planned.parts, folder.part_files())
            done = planned.num_rows - sum(part.num_rows for part in pending)
            on_progress(done, planned.num_rows)
            if pending:
                with closing(compute(spec, pending)) as events:
                    for event in events:
                        if isinstance(event, RowsEnded):
                            done += event.num_rows
                            on_progress(done, planned.num_rows)
            totals = folder.write_manifest(identity, planned.parts)
        return BatchReport(len(planned.parts), planned.ignored_columns, **totals)


def compute_here(spec: WorkerSpec, parts: Sequence[Part]) -> Generator[PartSummary | RowsEnded, None, None]:
    """All in this process, without Ray."""
    worker = BatchWorker(spec)
    try:
        yield from worker.run(parts)
    finally:
        worker.close()


def _describe(options: BatchOptions, planned: InputFile) -> tuple[WorkerSpec, dict[str, Any]]:
    store = ExpertStore.open(options.store_root)
    try:
        dtype = options.dtype or stored_dtype(store)
        store_hash = store_identity(store.manifest)
        budget_bytes = None
        if options.budgets:
            _, plan = plan_engine(store, EngineOptions(dtype=dtype), options.budgets, BATCH_BASE)
            budget_bytes = plan.budget_bytes
    finally:
        store.close()
    identity = job_identity(
        planned.format,
        planned.sha256,
        planned.num_rows,
        store_hash,
        options.model_name,
        dtype,
        options.defaults,
    )
    spec = WorkerSpec(
        str(options.store_root.resolve()),
        options.model_name,
        dtype,
        planned.path,
        planned.format,
        planned.nbytes,
        planned.mtime_ns,
        str(options.output.absolute()),
        options.defaults,
        budget_bytes,
    )
    return spec, identity
