"""The Ray Data shell of a batch: one actor that computes parts, and what Ray Data's defaults get wrong for that.

Ray Data carries part numbers and counts only. The worker reads the input and writes the output itself: no row passes
the object store, which a long one could fill, and no reader of Ray's opens a file that somebody else wrote. The actor
runs on the driver's node, since the paths are that machine's. Called by `gateway.batch.command`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from cluster.errors import ClusterError
from cluster.joining import join_ray
from cluster.processes import descendants, end_processes, quietly
from cluster.resources import NO_CPUS, NODE_LABEL, process_environment, start_ray
from experts.cores import num_cores
from experts.errors import ExpertError
from extraction.errors import ExtractionError
from extraction.interrupts import uninterrupted
from gateway.batch.output import PartSummary
from gateway.batch.plan import Part
from gateway.batch.worker import BatchWorker, RowsEnded, WorkerSpec
from gateway.errors import BatchFailed, GatewayError
from gateway.service.launch import interruptible
from router.errors import RouterError

RAY_GRACE_S = 2.0
EVENT = "event"
NO_RESTARTS: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
"""A row that ends the process would end it again, and the same command goes on from what is written."""


class PartActor:
    """Ray Data's callable class. Its errors are answers, so that Ray neither retries nor prints them."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: BatchWorker | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """batch: columns of Part. Yields one event a block."""
        columns = (batch["number"], batch["first_row"], batch["num_rows"], batch["offset"])
        parts = [Part(*map(int, row)) for row in zip(*columns, strict=True)]
        try:
            if self._worker is None:
                self._worker = BatchWorker(self._spec)
            for event in self._worker.run(parts):
                yield {EVENT: [json.dumps(asdict(event))]}
        except BatchFailed as error:
            yield {EVENT: [json.dumps({"failure": error.reason})]}
        except (ExtractionError, ExpertError, RouterError, ClusterError, GatewayError, OSError) as error:
            yield {EVENT: [json.dumps({"failure": str(error)})]}


def compute_with_ray(
    address: str | None, spec: WorkerSpec, parts: Sequence[Part]
) -> Generator[PartSummary | RowsEnded, None, None]:
    """Compute parts with the Ray at `address`, or with one that is started for it. Raises BatchFailed."""
    with ray_session(address), interruptible():  # Ray puts its own handlers in place
        yield from compute_on_ray(spec, parts)


def compute_on_ray(spec: WorkerSpec, parts: Sequence[Part]) -> Generator[PartSummary | RowsEnded, None, None]:
    """Compute parts with an actor of the Ray that is connected. Raises BatchFailed."""
    import pyarrow as pa
    import ray
    from ray.util.annotations import RayDeprecationWarning

    _tame_ray_data()
    table = pa.Table.from_pylist([asdict(part) for part in parts])
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to say these two; pyproject.toml stops before the release without it.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        events = ray.data.from_arrow(
            table
        ).map_batches(
            PartActor,
            fn_constructor_args=(spec,),
            batch_size=None,  # one call computes all: the engine's batch is full from the first row to the last
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=NO_CPUS,
            runtime_env={"env_vars": process_environment(num_cores())},
            label_selector={NODE_LABEL: ray.get_runtime_context().get_node_id()},
            **NO_RESTARTS,
        )
    try:
        for row in events.iter_rows():
            yield _read_event(row[EVENT])
    except ray.exceptions.RayError as error:
        raise BatchFailed(str(error).strip().splitlines()[0]) from error


def _read_event(text: str) -> PartSummary | RowsEnded:
    fields = json.loads(text)
    if "failure" in fields:
        raise BatchFailed(fields["failure"])
    return PartSummary(**fields) if "number" in fields else RowsEnded(**fields)


def _tame_ray_data() -> None:
    """No bars, plans or warnings on the user's terminal, and every event at once."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    context.target_max_block_size = 1  # a block is sent when it is full: events are seen when they happen
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """A Ray for as long as the context lasts: the one at `address`, or one of our own on loopback.

    Raises ClusterRefused, where strangers may call a cluster that goes beyond this machine: they could read the batch.
    """
    try:
        if address is None:
            start_ray()
        else:
            join_ray(address)
        yield
    finally:
        with uninterrupted():
            _stop_ray()


def _stop_ray() -> None:
    import ray

    started = descendants()
    quietly(ray.shutdown)
    end_processes(started, RAY_GRACE_S)
