"""Starts and stops the whole service: Ray, the supervisor with its expert actors, and the Serve application.

Called by `sage-moe serve`. What it started, it stops, in the reverse order, whenever it is interrupted; a Ray cluster
that ran before stays.
"""

from __future__ import annotations

import logging
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, Any

from cluster.addresses import LOOPBACK, is_local_only
from cluster.errors import ClusterError, ClusterRefused, HeadLost, SupervisorMissing
from cluster.light_start import starting_lightly
from cluster.memory_plan import MemoryPlan, router_names, unmatched
from cluster.processes import descendants, end_processes, quietly
from cluster.resources import (
    gateway_deployment_options,
    needs_supervisor,
    plan_spin_s,
    router_deployment_options,
)
from experts.store_source import StoreSource
from extraction.manifest import store_hash
from gateway.output_file import prepare_folder
from gateway.service.bind_address import BindAddress, check_bind, check_free, resolve_bind
from gateway.service.layout import (
    Layout,
    context_length,
    engine_options,
    lay_out_here,
    plan_scaling,
    plan_service_threads,
    read_model,
    record_bytes,
    store_copies,
)
from gateway.service.memory import this_node
from gateway.service.options import ServiceOptions
from router.loading import EngineOptions
from router.model_config import ModelConfig

if TYPE_CHECKING:
    from cluster.joining import RunningRay
    from gateway.service.placing import Placed

__all__ = [
    "ServiceOptions",
    "describe_plan",
    "interruptible",
    "running_service",
    "wait_for_interrupt",
    "wait_while_served",
]

logger = logging.getLogger(__name__)

OnPlan = Callable[[MemoryPlan, Sequence[str]], None]
OnPlaced = Callable[["Placed"], None]
SUPERVISOR_PATIENCE_S, SUPERVISOR_RETRY_S = 120.0, 0.5
"""How long, and how often, one that dies while the service starts is asked again."""
RAY_GRACE_S = 2.0
"""How long Ray's processes may take to go by themselves."""


@contextmanager
def running_service(
    options: ServiceOptions,
    on_plan: OnPlan = lambda plan, unknown: None,
    on_placed: OnPlaced = lambda placed: None,
) -> Iterator[str]:
    """The service, ready to answer, for as long as the context lasts. Yields its URL.

    on_plan: told how the memory is divided, before anything starts, and which nodes of `node-budgets` are unknown.
    on_placed: told what goes to which machine, before it goes there.
    Raises BindNeedsKey, PortTaken or AddressUnusable, OptionInvalid, what reading the store raises,
    ConfigUnsupported, BudgetTooSmall, NodeTooSmall, NodeBudgetTooSmall, ActorsNotStarted, or DeploymentFailed; with an
    address of a Ray that runs also ClusterRefused, TokenUnusable, ServiceRunsAlready or ServeTaken.
    """
    address = resolve_bind(options.host, options.port)
    check_bind(options.host, address, len(options.keys))
    if options.ray_address is None:  # a service that was killed may have left its port open in the cluster
        check_free(options.host, address)
    if options.trace_folder is not None:
        prepare_folder(options.trace_folder)
    config, dtype = read_model(options)
    threads = plan_service_threads(options, config)
    engine = engine_options(options, dtype, threads.router)
    layout: Layout | None = None
    if not options.is_placed:
        node = this_node()
        layout = lay_out_here(options, engine, threads, node)
        on_plan(layout.memory, unmatched(options.node_budgets, [node]))

    stack = ExitStack()
    try:
        stack.callback(_stop_ray)
        joined = _reach_ray(options)
        stack.enter_context(interruptible())  # again: Ray has put its own handler in place
        node_id = None if joined is None else _take_cluster(options, address, stack)
        if layout is None:
            layout = _place(options, engine, on_plan, on_placed)
        serving = _begin_serve(options, stack)
        supervisor = _begin_actors(options, config, engine, layout, node_id, stack)
        serving.result()
        _begin_application(options, address, config, engine, layout, node_id)
        _wait_until_served(supervisor)
        yield address.url
    except HeadLost:
        stack.pop_all()  # nobody is there who could stop anything in order
        _leave_lost_ray()
        raise
    finally:
        with _undisturbed():
            stack.close()


def _begin_serve(options: ServiceOptions, stack: ExitStack) -> Future[None]:
    """Serve itself, which takes as long as the supervisor to start, and so does beside it."""
    from gateway.service import serve_instance

    stack.callback(serve_instance.stop, options.ray_address is not None)
    return stack.enter_context(ThreadPoolExecutor(1)).submit(serve_instance.start)


def _place(options: ServiceOptions, engine: EngineOptions, on_plan: OnPlan, on_placed: OnPlaced) -> Layout:
    """By what the cluster's machines are."""
    from gateway.service.placing import place_service

    placed = place_service(options, engine)
    on_plan(placed.memory, placed.unknown_budgets)
    on_placed(placed)
    cores = min(node.num_cores for node in placed.topology.nodes)
    # Threads are each actor's own choice, by its machine.
    spin_s = plan_spin_s(cores, 1, 1, options.num_routers)
    return Layout(placed.plan, placed.memory, 1, spin_s, placed.placing)


def _begin_actors(
    options: ServiceOptions,
    config: ModelConfig,
    engine: EngineOptions,
    layout: Layout,
    node_id: str | None,
    stack: ExitStack,
) -> Any | None:
    """The supervisor, which starts the expert actors, and what gives them weights. Returns its handle at once; None
    where none is needed."""
    import ray

    from cluster.living_nodes import node_addresses
    from cluster.service_spec import ServiceSpec
    from cluster.supervisor import start_supervisor, stop_supervisor

    assert engine.dtype is not None
    spec = ServiceSpec(
        store_root=str(options.store_root.resolve()),
        dtype=engine.dtype,
        width=config.hidden_size,
        expert_width=config.expert_width,
        plan=layout.plan,
        threads_per_actor=layout.threads_per_actor,
        eviction=options.eviction,
        store_copies=store_copies(options),
        spin_s=layout.spin_s,
        secret=secrets.token_bytes(32),
        is_local_only=is_local_only(node_addresses()),
        rooms={ray.get_runtime_context().get_node_id(): sum(layout.memory.actor_budgets)},
        scaling=plan_scaling(options, engine, layout.card_share),
        cache=options.store_cache,
        record_bytes={} if options.ray_address is None else record_bytes(options),
        placing=layout.placing,
        expert_device="cpu" if options.expert_device == "cpu" else "cuda",
    )
    if options.store_cache is not None:
        stack.callback(_stop_keeper)
        host = LOOPBACK if spec.is_local_only else ""
        spec = replace(spec, store_source=_share_store(options, spec.secret, host))
    if not (options.is_placed or needs_supervisor(options.num_actors, options.num_routers)):
        return None
    stack.callback(stop_supervisor)
    return start_supervisor(spec, node_id)


def _reach_ray(options: ServiceOptions) -> RunningRay | None:
    """Start a Ray, or join the one that the options name and return it."""
    from cluster.joining import join_ray
    from cluster.resources import prepare_ray, service_environment, start_ray

    variables = service_environment()
    if options.ray_address is not None:
        # A cluster's own processes were started without our environment; those of this service get it from Ray.
        return join_ray(options.ray_address, process_variables=variables)
    prepare_ray(variables)
    import ray  # noqa: F401  # here, for two threads must not begin it at once

    # Serve takes a second to import, in which Ray's processes start; who needs it waits for this import to end.
    Thread(target=_import_serve, daemon=True).start()
    start_ray(options.num_cpus, is_for_service=True)
    return None


def _import_serve() -> None:
    with starting_lightly():
        import gateway.service.serve_instance  # noqa: F401


def _take_cluster(options: ServiceOptions, address: BindAddress, stack: ExitStack) -> str:
    """Become the one service of the cluster that was joined. Returns Ray's id of this node, its head.

    Ends what a service that was killed has left there. Raises ClusterRefused, ServeTaken, ServiceRunsAlready or
    PortTaken.
    """
    from cluster.joining import driver_node

    node_id, is_head = driver_node()
    if not is_head:
        raise ClusterRefused(
            "this machine is a worker of the cluster", "run this on its head, where the port will be"
        )

    from cluster.lease import release_lease, take_lease
    from cluster.supervisor import stop_supervisor
    from gateway.service import serve_instance

    serve_instance.check_free()
    take_lease(options.model_name, address.url)
    stack.callback(release_lease)
    stop_supervisor()
    _stop_keeper()
    serve_instance.stop(is_shared=True)
    check_free(options.host, address)
    return node_id


def _share_store(options: ServiceOptions, secret: bytes, host: str) -> StoreSource:
    """Start to give the store's records to other machines. Returns where they find them. Raises KeeperNotStarted."""
    from cluster.weight_keeper import start_keeper

    root = str(options.store_root.resolve())
    head = start_keeper(root, secret, host)
    return StoreSource(store_hash(options.store_root), (root, *store_copies(options)), head=head)


def _stop_keeper() -> None:
    from cluster.weight_keeper import stop_keeper

    stop_keeper()


def _wait_for_actors(supervisor: Any) -> None:
    """Raises ActorsNotStarted, or SupervisorMissing where it died and did not come back."""
    import ray

    give_up_at = time.monotonic() + SUPERVISOR_PATIENCE_S
    while True:
        try:
            ray.get(supervisor.wait_ready.remote())
            return
        except ray.exceptions.RayTaskError as error:
            # Ray's error carries the supervisor's stack; what it raised is the message for the user.
            raise (error.cause if isinstance(error.cause, ClusterError) else error) from error
        except ray.exceptions.RayActorError as error:  # it died; Ray restarts it
            if time.monotonic() > give_up_at:
                raise SupervisorMissing(str(error).splitlines()[0]) from error
        time.sleep(SUPERVISOR_RETRY_S)


def describe_plan(options: ServiceOptions) -> dict[str, Any]:
    """What `running_service` would start, as plain values; keys are counted only. Raises like it.

    Connects to a cluster only where actors would be placed on its machines, and then starts nothing but questions.
    """
    address = resolve_bind(options.host, options.port)
    check_bind(options.host, address, len(options.keys))
    config, dtype = read_model(options)
    threads = plan_service_threads(options, config)
    engine = engine_options(options, dtype, threads.router)
    placed = ask_cluster(options) if options.is_placed else None
    memory = (placed or lay_out_here(options, engine, threads, this_node())).memory
    shown = options.shown() | {"dtype": dtype, "max-model-len": context_length(options, config)}
    gateway = {"name": "gateway", **gateway_deployment_options()}
    router = router_deployment_options()
    routers = ({"name": name, **router} for name in router_names(options.num_routers))
    application = {"name": "sage-moe", "deployments": [gateway, *routers]}
    return {
        "options": shown,
        "memory": memory.as_json(),
        **_described(placed),
        "threads": {"router": threads.router, "expert-actor": threads.expert_actor},
        "http": {"address": address.address, "port": address.port},
        "serve": {"applications": [application]},
    }


def ask_cluster(options: ServiceOptions) -> Placed:
    """What would be placed where, without taking the cluster. Raises like `place_service` and `join_ray`."""
    config, dtype = read_model(options)
    engine = engine_options(options, dtype, plan_service_threads(options, config).router)
    with ExitStack() as stack:
        stack.callback(_stop_ray)
        _reach_ray(options)

        from gateway.service.placing import (
            place_service,  # imports Ray, which must find the environment of the cluster
        )

        return place_service(options, engine)


def _described(placed: Placed | None) -> dict[str, Any]:
    from gateway.service.placement_view import placement_json

    return {} if placed is None else {"placement": placement_json(placed)}


def _begin_application(
    options: ServiceOptions,
    address: BindAddress,
    config: ModelConfig,
    engine: EngineOptions,
    layout: Layout,
    node_id: str | None,
) -> None:
    """Gateway and routers. Returns before they have started. node_id: of the node that has the store; None where there
    is one only."""
    from gateway.service import serve_instance
    from gateway.service.application import build_application, gateway_spec, router_spec

    routers = router_spec(options, engine, layout)
    gateway = gateway_spec(options, config, engine, address)
    serve_instance.begin(build_application(routers, gateway, node_id))


def _wait_until_served(supervisor: Any | None) -> None:
    """Until actors, routers and gateway have answered, which start side by side. Raises ActorsNotStarted,
    SupervisorMissing or DeploymentFailed."""
    from gateway.service import serve_instance

    if supervisor is not None:
        _wait_for_actors(supervisor)
    serve_instance.wait_running()


def _leave_lost_ray() -> None:
    """Ray would try for a minute to reach a head that is lost, also at the end of this process."""
    import atexit

    import ray

    atexit.unregister(ray.shutdown)
    end_processes(descendants(), 0.0)


def _stop_ray() -> None:
    import ray

    started = descendants()
    quietly(ray.shutdown)
    end_processes(started, RAY_GRACE_S)


def wait_while_served() -> None:
    """Return on SIGINT or SIGTERM. Raises HeadLost."""
    from cluster.head_watch import wait_head_lost

    try:
        wait_head_lost()
    except KeyboardInterrupt:
        return


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
