"""What Ray's defaults get wrong for us, set in one place: CPUs, threads, queues, time-outs, environment.

Ray would give every replica and actor a whole CPU (a 2-core node is then full before the first expert actor),
derive thread counts from that, allow five requests at once and queue without bound. Pure values and one function
that starts Ray; used by `cluster.supervisor`, `gateway.service.application` and `gateway.service.launch`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from cluster.processes import started_patiently
from experts.cores import useful_threads

NAMESPACE = "sage-moe"
SUPERVISOR_NAME = "supervisor"
WEIGHT_KEEPER_NAME = "weights"
SYNC_KEEPER_NAME = "weights-sync"
LOCAL_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""For a Ray that serves this machine alone: this is how Ray is told, on any system, to use the loopback address in
place of the machine's own, so that its ports are closed to others. Ray reads it when it is first imported. Token
authentication is on by Ray's own default for a Ray that is started here."""
OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""In place of a third of the memory: activations and rows do not pass Ray's object store, and experts want it. Images
and sound of requests do, by way of the disk where there are more at a time."""
SPIN_S = 0.0001
BUSY_SPIN_S = 0.005
"""Longer than router and actor wait for each other in a layer, with experts for which one thread does."""
NODE_LABEL = "ray.io/node-id"
"""Ray puts it on every node; whatever asks for its value runs there and nowhere else."""
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""For a replica: Serve would run its own code, ours and the calls that we make on three event loops, and wake one for
what another has got. Ours blocks none, so that one is enough."""
FIRST_IMPORTS, LIGHT_START = "RAY_preload_python_modules", "cluster.worker_start"
"""What processes of a Ray that is started for a service import first."""
HEALTH_CHECKS = {"health_check_period_s": 1.0, "health_check_timeout_s": 4.0}
"""Of Serve's replicas: requests wait for a router that is dead or hangs, and nobody else has the gateway's port."""
NO_CPUS = 0.0
"""Scheduling weight of our actors and replicas: they share the cores by threads, not by Ray's bookkeeping."""


@dataclass(frozen=True)
class ThreadPlan:
    """Torch threads of each kind of process on one machine."""

    router: int
    expert_actor: int


def plan_threads(num_cores: int, num_actors: int, expert_elements: int, num_routers: int = 1) -> ThreadPlan:
    """Share out the cores. A router waits while actors compute and the other way round, so each side may use
    all cores; the actors of one machine compute at the same time and share them, and so do its routers.

    expert_elements: of one expert's largest matrix; see `useful_threads`.
    """
    per_actor = max(1, num_cores // max(1, num_actors))
    per_router = max(1, num_cores // num_routers)
    return ThreadPlan(useful_threads(per_router, expert_elements), useful_threads(per_actor, expert_elements))


def plan_spin_s(num_cores: int, num_actors: int, threads_per_actor: int, num_routers: int = 1) -> float:
    """How long the data plane's readers look before they sleep: briefly where routers and actors have a core each, and
    as long as traffic lasts where all the actors' threads and the routers have. A core that sleeps between layers
    computes the next one up to twice as slowly (measured on 2 cores; benchmarks/bench_cluster.py)."""
    if num_actors == 0 or num_cores < num_actors + num_routers:
        return 0.0
    return BUSY_SPIN_S if num_cores >= num_actors * threads_per_actor + num_routers else SPIN_S


def needs_supervisor(num_actors: int, num_routers: int) -> bool:
    """Whether there are actors to look after, or several routers that learn into one ledger."""
    return num_actors > 0 or num_routers > 1


def service_environment() -> dict[str, str]:
    """Environment of all processes of a service, and of the Ray that starts them.

    One for all: for a process with one of its own, Ray takes none of those that it has begun ahead, and imports itself
    twice. Whatever computes chooses its number of threads itself.
    """
    return ray_environment() | process_environment(1) | ONE_LOOP


def process_environment(num_threads: int) -> dict[str, str]:
    """Environment of a process that computes. Passive waiting, or idle threads would take the others' cores."""
    threads = str(num_threads)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def ray_environment() -> dict[str, str]:
    """Environment of Ray itself, set before it starts."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # A replica that hangs would else be asked to end in order, and its answers would wait for that.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # It would kill what Ray can start again, and so the router, before an expert actor, which others stand in for.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # For the same ten seconds, but by fiftieths: a node whose own object store is not there yet when it first
        # looks, as on a busy machine, would else be up a whole second later.
        "RAY_raylet_client_connect_timeout_milliseconds": "20",
        "RAY_raylet_client_num_connect_attempts": "500",
        # Ray's own default, 15, lets whatever else runs on the machine go before every answer.
        "RAY_worker_niceness": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def expert_actor_options(name: str) -> dict[str, Any]:
    """Ray options of an expert actor: outlives its creator, is never restarted by Ray, found by name."""
    return _detached(name) | {"max_restarts": 0, "max_concurrency": 4}


def supervisor_options(node_id: str | None = None) -> dict[str, Any]:
    """Ray options of the supervisor: Ray restarts it for ever, and it then adopts the actors it finds.

    node_id: where the store and the trust ledger are; None where there is one node only.
    """
    options = {"max_restarts": -1, "max_concurrency": 16, **_place(node_id)}
    return _detached(SUPERVISOR_NAME) | options


def weight_keeper_options(name: str = WEIGHT_KEEPER_NAME) -> dict[str, Any]:
    """Ray options of the head's weight server: Ray restarts it for ever, with the port that it had."""
    return _detached(name) | {"max_restarts": -1, "max_concurrency": 2}


def _detached(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": NO_CPUS,
        "max_task_retries": 0,
    }


def router_deployment_options(node_id: str | None = None) -> dict[str, Any]:
    """Serve options of one router. Its own admission bounds the work; Serve's limit only has to stay out of the way.

    Serve looks for a dead one at its health checks, while that one's requests wait, and ends one that has not answered
    three of them. They are answered beside the engine's thread, in a few milliseconds where all cores compute. node_id:
    where it has to run, in Ray's own terms; None lets Ray choose.
    """
    limits = {"max_ongoing_requests": 2000, "max_queued_requests": 2000}
    return _deployment(node_id) | limits | HEALTH_CHECKS


def gateway_deployment_options(node_id: str | None = None) -> dict[str, Any]:
    """Serve options of the gateway. Its requests come over its own port and not by Serve."""
    return _deployment(node_id) | HEALTH_CHECKS


def _place(node_id: str | None) -> dict[str, Any]:
    """Ray options of what runs on that node and nowhere else."""
    return {} if node_id is None else {"label_selector": {NODE_LABEL: node_id}}


def _deployment(node_id: str | None) -> dict[str, Any]:
    return {
        "num_replicas": 1,
        "ray_actor_options": {
            "num_cpus": NO_CPUS,
            **_place(node_id),
        },
        "max_constructor_retry_count": 1,
        "graceful_shutdown_timeout_s": 600.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
    }


def prepare_ray(process_variables: Mapping[str, str] | None = None) -> None:
    """Set the environment for a Ray that this process starts, and of all that it starts: before Ray is first imported.
    What is set already stays, but for how processes compute: a shell's threads that wait busily would slow all down."""
    defaults = ray_environment() | LOCAL_ONLY | dict(process_variables or {})
    if "ray" not in sys.modules:
        # What Ray would decide itself, with a warning; once it is imported, it takes a change for a mistake.
        defaults |= {"RAY_AUTH_MODE": "token"}
    os.environ.update({key: os.environ.get(key, value) for key, value in defaults.items()})
    ours = process_variables or {}
    os.environ.update({key: ours[key] for key in process_environment(1) if key in ours})


def start_ray(num_cpus: int | None = None, *, is_for_service: bool = False) -> None:
    """Start a Ray for this process, on loopback, also beside another; `cluster.joining` joins one that runs already.

    is_for_service: whether nothing but a service will run there, which needs less than others; see
    `cluster.light_start`.
    """
    import logging

    prepare_ray()
    import ray

    def start() -> None:
        ray.init(
            address="local",  # else Ray looks for another one first, and finds also what is left of a dead one
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=True,
        )

    with _first_imports() if is_for_service else nullcontext():
        started_patiently(start)


@contextmanager
def _first_imports() -> Iterator[None]:
    """For the Ray that is started inside, and no other: a batch's, which would inherit it, needs what is spared."""
    if FIRST_IMPORTS in os.environ:  # as everywhere, what a user has set stays
        yield
        return
    os.environ[FIRST_IMPORTS] = LIGHT_START
    try:
        yield
    finally:
        del os.environ[FIRST_IMPORTS]
