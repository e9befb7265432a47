"""A Ray of several nodes on this machine, each with a raylet of its own, as the supervisor meets it."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.processes import started_patiently
from cluster.ray_directory import RayDirectory
from cluster.resources import NAMESPACE
from cluster.service_spec import ServiceSpec
from experts.channel import TransportLimits
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from router.loading import LoadedEngine, stored_dtype
from router.model_config import read_model_config
from router.request import GenerationRequest, SamplingParams
from tests.engines import run_to_end

WAIT_S = 240.0
"""For anything, on a busy machine."""
OBJECT_STORE_BYTES = 80 * 2**20
PATIENT_MISSES = 40


def add_node(cluster: Cluster, **options: Any) -> Any:
    """The first one is the head."""
    return started_patiently(lambda: cluster.add_node(**options))


@contextmanager
def ray_nodes(
    num_nodes: int,
    variables: Sequence[Mapping[str, str]] = (),
    *,
    num_gpus: Sequence[int] = (),
    setup_hook: str | None = None,
) -> Iterator[tuple[Cluster, list[str]]]:
    """The cluster, and the ids of its nodes, the head's first. This process is connected to it.

    variables: for the environment of each node's processes. num_gpus: that Ray counts on each node. setup_hook: a
    function, as `module.name`, that every process calls when it begins.
    """
    cluster = Cluster()
    try:
        nodes = [  # Ray keeps them in a set
            add_node(
                cluster,
                num_cpus=1,
                num_gpus=num_gpus[number] if num_gpus else 0,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                env_vars=dict(variables[number]) if variables else {},
            )
            for number in range(num_nodes)
        ]
        ray.init(
            address=cluster.address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"worker_process_setup_hook": setup_hook} if setup_hook else None,
        )
        yield cluster, [node.node_id for node in nodes]
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def service_spec(root: Path, plan: Any, **more: Any) -> ServiceSpec:
    """Of a store's experts, with a secret of its own."""
    store = ExpertStore.open(root)
    config, dtype = read_model_config(store.served.config), stored_dtype(store)
    store.close()
    return ServiceSpec(
        str(root),
        dtype,
        config.hidden_size,
        config.expert_width,
        plan,
        1,
        secret=secrets.token_bytes(32),
        **more,
    )


def patient_directory(worker: ExpertWorker) -> RayDirectory:
    """One that takes no actor for lost which a busy machine keeps from sending heartbeats for some seconds."""
    patient = partial(TransportLimits, heartbeat_misses=PATIENT_MISSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.ray_directory.TransportLimits", patient)
        directory = RayDirectory(worker)
    directory.begin()
    return directory


def wait_settled(supervisor: Any) -> None:
    ray.get(supervisor.wait_settled.remote(WAIT_S), timeout=WAIT_S + 30.0)


def greedy(name: str, max_tokens: int = 24) -> GenerationRequest:
    return GenerationRequest(name, (1, 2, 3, 4, 5), SamplingParams(max_tokens=max_tokens, temperature=0.0))


@dataclass
class Stream:
    """Asks an engine for the same answer again and again on a thread, for as long as the context lasts."""

    loaded: LoadedEngine
    answers: list[list[int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __enter__(self) -> Stream:
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        while not self._is_over.is_set() or not self.answers:
            name = f"stream-{len(self.answers)}"
            outcome = run_to_end(self.loaded.engine, [greedy(name)])
            self.answers.append(outcome.tokens[name])
            if outcome.reasons[name] == "error":
                self.errors.append(name)
                return


def states(status: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in status["actors"]}


def pids(entries: Sequence[dict[str, Any]]) -> set[int]:
    return {entry["pid"] for entry in entries if "pid" in entry}
