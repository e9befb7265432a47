"""The Serve shells: the router deployment, the gateway deployment, and the client between them.

Contain no decision. A request's way: `GatewayDeployment` (HTTP, one event loop) -> `ServeRouterClient` -> one
small call to submit -> `RouterDeployment` -> engine thread; and back in one stream of events for all requests of
the gateway.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.capacity import CapacityState, Load, ServiceSize, num_actors, present_state, resident_bytes
from cluster.capacity_watch import CapacityWatch
from cluster.memory_plan import MemoryPlan
from cluster.ray_directory import RayDirectory
from cluster.resources import gateway_deployment_options, router_deployment_options
from cluster.trust_keeper import SupervisedTrust
from experts.budget import share_of
from experts.directory import LocalDirectory
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from gateway.api_keys import NO_KEYS, KeyRing
from gateway.capacity_metrics import render_capacity
from gateway.chat_template import ChatTemplate
from gateway.errors import ApiError, GatewayError, RouterBusy, RouterUnavailable
from gateway.http_app import GatewaySettings, build_app
from gateway.router_client import RouterHealth
from gateway.routing_rules import NATIVE_ONLY, RoutingRules
from gateway.study import trace_service
from gateway.tokenizer import TextTokenizer
from router.errors import EngineStopped, QueueFull, RequestTooLong, RouterError, StreamMissing, TraceFailed
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.metrics import local_actor, render_metrics
from router.model_config import read_model_config
from router.request import GenerationRequest, TokenEvent
from router.service import RouterService
from router.trace import RoutingTrace

logger = logging.getLogger(__name__)

APP_NAME = "sage-moe"
ROUTER_NAME = "router"
STREAM_RETRIES, STREAM_RETRY_S = 40, 0.05
"""How often and when a request is offered again to a router that has just ended our idle stream."""


@dataclass(frozen=True)
class DeploymentSpec:
    """What both deployments need to know."""

    store_root: str
    model_name: str
    num_actors: int
    engine: EngineOptions
    model_aliases: tuple[str, ...] = ()
    keys: KeyRing = NO_KEYS
    cors_origins: tuple[str, ...] = ()
    routing: RoutingRules = NATIVE_ONLY
    memory: MemoryPlan | None = None
    """How the node's memory was divided at the start."""
    trace_folder: str | None = None
    """Where routing traces go; None means nowhere."""
    is_trace_with_tokens: bool = False
    is_capacity_auto: bool = False
    """Whether the capacity state sets how many experts stay in memory."""


class RouterDeployment:
    """One router replica: `RouterService` behind Serve."""

    async def __init__(self, spec: DeploymentSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        self._spec = spec
        self._directory: RayDirectory | None = None
        loaded = await asyncio.to_thread(self._load_engine)
        sinks = (loaded.trust.collector,) if loaded.trust is not None else ()
        self._service = RouterService(loaded, sinks)
        self._size = _service_size(self._service.loaded, spec.num_actors)
        self._resizer = ThreadPoolExecutor(1, "capacity")  # one after another, and off the event loop
        self._capacity = CapacityWatch(self._size, self._begin_resize if spec.is_capacity_auto else None)
        self._trace: RoutingTrace | None = None
        if spec.trace_folder is not None:
            self._trace = trace_service(
                self._service.loaded, Path(spec.trace_folder), has_tokens=spec.is_trace_with_tokens
            )

    def _load_engine(self) -> LoadedEngine:
        store = ExpertStore.open(Path(self._spec.store_root))
        if not self._spec.num_actors:
            return load_engine(store, self._spec.engine, LocalDirectory)

        def connect(worker: ExpertWorker) -> RayDirectory:
            self._directory = RayDirectory(worker)
            return self._directory

        return load_engine(store, self._spec.engine, connect, SupervisedTrust)

    def __del__(self) -> None:
        """Called by Serve when the replica stops in an orderly way; a failure is in the log already."""
        with suppress(AttributeError, TraceFailed):
            if self._trace is not None:
                self._trace.close()
        service = getattr(self, "_service", None)
        if service is not None:
            service.loaded.keep_learned()

    async def check_health(self) -> None:
        """Called by Serve; raising makes it replace the replica."""
        self._observe_capacity()
        if not self._service.engine_thread.health().is_alive:
            raise EngineStopped("its thread ended")

    def _observe_capacity(self) -> CapacityState:
        """Whenever Serve checks the router's health and somebody asks."""
        health = self._service.engine_thread.health()
        is_idle = not self._service.num_open  # what else runs are probes
        return self._look(0, 0) if is_idle else self._look(health.num_running, health.num_waiting)

    def _look(self, num_running: int, num_waiting: int) -> CapacityState:
        load = Load(num_running, num_waiting, self._spec.engine.limits.max_running)
        return self._capacity.look(load, time.monotonic())

    def _begin_resize(self, share: Fraction) -> None:
        self._resizer.submit(self._resize, share)

    def _resize(self, share: Fraction) -> None:
        """On the resizer's thread: waits for the call that is being computed."""
        worker = self._service.loaded.worker
        logger.info("keeping at most %s of the experts within the budget", share)
        if worker.budget_bytes is not None:
            worker.set_budget(share_of(share, worker.group_bytes))
        if self._directory is not None:
            self._directory.set_share(share)

    async def submit(self, gateway: str, request: GenerationRequest) -> None:
        self._service.submit(gateway, request)
        # A request ends rest at once; whether it has to wait shows at a later look.
        health = self._service.engine_thread.health()
        self._look(max(1, health.num_running), max(0, health.num_waiting - 1))

    async def cancel_request(self, request_id: str) -> None:
        self._service.cancel(request_id)

    async def feedback(self, answer_id: str, score: float) -> bool:
        return self._service.feedback.give(answer_id, score)

    async def events(self, gateway: str) -> AsyncGenerator[tuple[TokenEvent, ...], None]:
        async with aclosing(self._service.events(gateway)) as stream:
            async for events in stream:
                yield events

    async def health(self) -> RouterHealth:
        health = await self._service.health()
        return RouterHealth(health.is_ready, health.detail)

    async def metrics(self) -> str:
        state = self._observe_capacity()
        own = render_capacity(state, resident_bytes(state, self._size), num_actors(state, self._size))
        return render_metrics(self._service, await self._actors()) + own

    async def status(self) -> dict[str, object]:
        """Plain values: the router itself, its experts, the actors and nodes."""
        service = self._service
        loaded = service.loaded
        engine = loaded.engine
        health = service.engine_thread.health()
        quantization = loaded.store.manifest.quantization
        actors = await self._actors()
        state = self._observe_capacity()
        return {
            "model": self._spec.model_name,
            "router": {
                "pid": os.getpid(),
                "numerics_class": loaded.worker.numerics_class,
                "quantization": quantization.name if quantization is not None else None,
                "row_multiple": loaded.kernel.row_multiple,
                "backbone_bytes": engine.backbone.nbytes,
                "kv_bytes": engine.pool.nbytes,
                "experts": local_actor(service),
                "expert_calls": asdict(loaded.directory.stats()),
                "connected_actors": len(self._directory.remote.connected()) if self._directory else 0,
                "phase_seconds": dict(engine.stats.phase_seconds),
                "steps": engine.stats.steps,
                "trust": loaded.trust.status() if loaded.trust is not None else None,
                "stand_ins": loaded.stand_ins.status() if loaded.stand_ins is not None else None,
            },
            "capacity": {
                "state": state,
                "shown": present_state(state, self._size),
                "resident_bytes": resident_bytes(state, self._size),
                "actors": num_actors(state, self._size),
            },
            "actors": actors,
            "memory": self._spec.memory.as_json() if self._spec.memory else None,
            "nodes": await asyncio.to_thread(_nodes),
            "requests": {
                "running": health.num_running,
                "waiting": health.num_waiting,
                "generated_tokens": engine.stats.generated_tokens,
                "prompt_tokens": engine.stats.prompt_tokens,
            },
        }

    async def _actors(self) -> list[dict[str, Any]]:
        if self._directory is None:
            return []
        try:
            return await asyncio.to_thread(self._directory.actors)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("no status of the expert actors: %s", error)
            return []


def _service_size(loaded: LoadedEngine, max_actors: int) -> ServiceSize:
    config, store = loaded.config, loaded.store
    keys = store.expert_keys(store.served.name)
    return ServiceSize(
        len(config.moe_layers),
        config.num_experts,
        config.experts_per_token,
        store.record(keys[0]).nbytes if keys else 0,
        max_actors,
    )


class ServeRouterClient:
    """`gateway.router_client.RouterClient` over a Serve handle: one event stream for all requests."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._name = f"gateway-{uuid.uuid4().hex[:12]}"
        self._queues: dict[str, asyncio.Queue[TokenEvent | None]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._standing = asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """See RouterClient.generate."""
        queue: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        self._queues[request.request_id] = queue
        is_done = False
        try:
            await self._connect()
            await self._submit(request)
            while not is_done:
                event = await queue.get()
                if event is None:
                    is_done = True
                    raise RouterUnavailable("the router was lost")
                is_done = event.finish_reason is not None
                yield event
        finally:
            del self._queues[request.request_id]
            if not is_done:
                _detached(self._cancel(request.request_id))

    async def _cancel(self, request_id: str) -> None:
        try:
            await _response(self._handle.cancel_request.remote(request_id))
        except ray.exceptions.RayError as error:
            logger.warning("request %s is not cancelled: %s", request_id, type(error).__name__)

    async def health(self) -> RouterHealth:
        try:
            answer: RouterHealth = await asyncio.wait_for(_response(self._handle.health.remote()), 8.0)
        except TimeoutError:
            return RouterHealth(False, "the router does not answer")
        except ray.exceptions.RayError as error:
            return RouterHealth(False, type(error).__name__)
        return answer

    async def feedback(self, answer_id: str, score: float) -> bool:
        return bool(await self._ask(self._handle.feedback.remote(answer_id, score)))

    async def metrics(self) -> str:
        return str(await self._ask(self._handle.metrics.remote()))

    async def status(self) -> dict[str, object]:
        return dict(await self._ask(self._handle.status.remote()))

    async def _ask(self, response: Any) -> Any:
        try:
            return await _response(response)
        except ray.exceptions.RayError as error:
            raise RouterUnavailable(type(error).__name__) from error

    async def _submit(self, request: GenerationRequest) -> None:
        """Raises what the router's refusal means to a client."""
        for _ in range(STREAM_RETRIES):
            try:
                await _response(self._handle.submit.remote(self._name, request))
                return
            except (ray.exceptions.RayTaskError, RouterError) as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                if not isinstance(cause, StreamMissing):
                    raise _refusal(cause) from error
            except ray.exceptions.RayError as error:
                raise RouterUnavailable(type(error).__name__) from error
            # The router has just ended our idle stream; the reader opens another.
            await asyncio.sleep(STREAM_RETRY_S)
        raise RouterUnavailable("it has no stream of ours")

    async def _connect(self) -> None:
        if self._reader is None or self._reader.done():
            self._standing.clear()
            self._reader = _detached(self._read())
        try:
            await asyncio.wait_for(self._standing.wait(), 30.0)
        except TimeoutError as error:
            raise RouterUnavailable("the router does not answer") from error

    async def _read(self) -> None:
        """Hand events to their requests while there are any. When a stream breaks, every open request is told."""
        try:
            while self._queues:
                await self._read_stream()
        except ray.exceptions.RayError as error:
            logger.warning("the router's event stream broke: %s", type(error).__name__)
        finally:
            for queue in self._queues.values():
                queue.put_nowait(None)

    async def _read_stream(self) -> None:
        """Until the router ends it, which it does when it has none of our requests."""
        stream: Any = self._handle.options(stream=True).events.remote(self._name)
        async for events in stream:
            self._standing.set()
            for event in events:
                queue = self._queues.get(event.request_id)
                if queue is not None:
                    queue.put_nowait(event)


def _refusal(cause: Exception) -> GatewayError:
    if isinstance(cause, QueueFull):
        return RouterBusy(cause.retry_after_s)
    if isinstance(cause, RequestTooLong):
        return ApiError(400, f"Not enough memory for this request: {cause}.", code="context_length_exceeded")
    return RouterUnavailable(str(cause))


async def _response(response: Any) -> Any:
    return await response


_running: set[asyncio.Task[None]] = set()
"""The event loop itself keeps only weak references."""


def _detached(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run work that must outlive the request that began it: Serve ends whatever a request's context has called when
    the request's client leaves."""
    task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task


def build_gateway(spec: DeploymentSpec, handle: DeploymentHandle[Any]) -> FastAPI:
    """The gateway's HTTP app over a router handle. Runs inside the gateway's replica."""
    root = Path(spec.store_root)
    store = ExpertStore.open(root)
    config = read_model_config(store.served.config)
    tokenizer = TextTokenizer.from_folder(root)
    context_length = spec.engine.max_model_len or config.max_position_embeddings
    facts = (spec.model_name, context_length, config.vocab_size, int(time.time()))
    settings = replace(
        GatewaySettings.from_manifest(store.manifest, *facts),
        is_request_id_sent=False,  # Serve's proxy sends it
        model_aliases=spec.model_aliases,
        keys=spec.keys,
        cors_origins=spec.cors_origins,
        routing=spec.routing,
        max_open_requests=spec.engine.limits.max_open,
    )
    store.close()
    template = ChatTemplate.from_folder(root, tokenizer)
    return build_app(settings, tokenizer, template, ServeRouterClient(handle))


def build_application(spec: DeploymentSpec, num_threads: int) -> serve.Application:
    """The Serve application: gateway in front, router behind."""

    def build_app_in_replica() -> FastAPI:
        return build_gateway(spec, serve.get_deployment_handle(ROUTER_NAME, app_name=APP_NAME))

    deployment: Any = serve.deployment  # its overloads lose the type of what it returns
    router = deployment(RouterDeployment, name=ROUTER_NAME, **router_deployment_options(num_threads))
    options = gateway_deployment_options(spec.engine.limits.max_open)
    gateway = deployment(serve.ingress(build_app_in_replica)(), name="gateway", **options)
    app: serve.Application = gateway.bind(router.bind(spec))
    return app


def _nodes() -> list[dict[str, Any]]:
    """The Ray nodes: name, address, state, CPUs."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        {
            "node": node["NodeID"][:12],
            "address": node["NodeManagerAddress"],
            "state": "alive" if node["Alive"] else "dead",
            "cpus": node["Resources"].get("CPU", 0.0),
            "gpus": node["Resources"].get("GPU", 0.0),
        }
        for node in nodes
    ]
