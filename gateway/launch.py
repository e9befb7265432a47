"""Starts and stops the whole service: Ray, the supervisor with its expert actors, and the Serve application.

Called by `sage-moe serve`. What it started, it stops, in the reverse order, whenever it is interrupted.
"""

from __future__ import annotations

import errno
import io
import logging
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from experts.numerics import num_cores
from experts.store import ExpertStore
from gateway.errors import AddressUnusable, DeploymentFailed, PortTaken
from router.loading import EngineOptions, stored_dtype
from router.model_config import read_model_config

logger = logging.getLogger(__name__)

RAY_GRACE_S = 2.0
"""How long Ray's processes may take to go by themselves."""


@dataclass(frozen=True)
class ServiceOptions:
    """What `sage-moe serve` was asked for."""

    store_root: Path
    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    num_actors: int = 0
    dtype: str | None = None
    ray_address: str | None = None
    """An existing Ray; None starts one for this service."""
    num_cpus: int | None = None
    """What a Ray that is started counts as its CPUs; None means the machine's."""


@contextmanager
def running_service(options: ServiceOptions) -> Iterator[None]:
    """The service, ready to answer, for as long as the context lasts.

    Raises PortTaken or AddressUnusable, what reading the store raises, ConfigUnsupported, ActorsNotStarted, or
    DeploymentFailed.
    """
    _check_address(options.host, options.port)
    store = ExpertStore.open(options.store_root)
    config = read_model_config(store.served.config)
    dtype = options.dtype or stored_dtype(store)
    store.close()

    from cluster.resources import plan_spin_s, plan_threads, start_ray

    threads = plan_threads(num_cores(), options.num_actors, config.expert_elements)
    stack = ExitStack()
    try:
        stack.callback(_stop_ray)
        start_ray(options.ray_address, options.num_cpus)
        stack.enter_context(interruptible())  # again: Ray has put its own handler in place

        from cluster.supervisor import ServiceSpec, start_supervisor, stop_supervisor

        spec = ServiceSpec(
            store_root=str(options.store_root.resolve()),
            dtype=dtype,
            width=config.hidden_size,
            expert_width=config.expert_width,
            num_actors=options.num_actors,
            threads_per_actor=threads.expert_actor,
            spin_s=plan_spin_s(num_cores(), options.num_actors),
            secret=secrets.token_bytes(32),
        )
        if options.num_actors:
            stack.callback(stop_supervisor)
            _wait_for_actors(start_supervisor(spec))
        _deploy(options, dtype, threads.router, stack)
        yield
    finally:
        with _undisturbed():
            stack.close()


def _wait_for_actors(supervisor: Any) -> None:
    import ray

    try:
        ray.get(supervisor.wait_ready.remote())
    except ray.exceptions.RayTaskError as error:
        # Ray's error carries the supervisor's stack; what it raised is the message for the user.
        raise (error.cause if isinstance(error.cause, ClusterError) else error) from error


def _deploy(options: ServiceOptions, dtype: str, num_threads: int, stack: ExitStack) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from gateway.deployment import APP_NAME, DeploymentSpec, build_application

    spec = DeploymentSpec(
        str(options.store_root.resolve()),
        options.model_name,
        options.num_actors,
        EngineOptions(dtype=dtype, num_threads=num_threads),
    )
    stack.callback(_quietly, serve.shutdown)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=HTTPOptions(host=options.host, port=options.port, request_timeout_s=3600.0))
    try:
        serve.run(build_application(spec, num_threads), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[APP_NAME].deployments.values()
        reasons = [deployment.message for deployment in deployments if deployment.message]
        raise DeploymentFailed(reasons[0] if reasons else str(error)) from error


def _check_address(host: str, port: int) -> None:
    """Ray Serve would only say so after half a minute, in a log. Raises PortTaken or AddressUnusable."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(host, port) from error
        raise AddressUnusable(host, error.strerror or str(error)) from error


def _quietly(stop: Callable[[], None]) -> None:
    """Ray prints that its own tasks fail while it is stopped; a user would take that for an error."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        stop()


def _stop_ray() -> None:
    import ray

    from cluster.processes import descendants, end_processes

    started = descendants()
    _quietly(ray.shutdown)
    end_processes(started, RAY_GRACE_S)


def wait_for_interrupt() -> None:
    """Return on SIGINT or SIGTERM."""
    try:
        while True:
            time.sleep(3600.0)
    except KeyboardInterrupt:
        return


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM and a closed terminal end the process like Ctrl-C: by an exception, so that everything started
    is stopped."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no further interrupt cut the cleaning up short."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous: dict[signal.Signals, Any] = {
        number: signal.signal(number, signal.SIG_IGN) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
