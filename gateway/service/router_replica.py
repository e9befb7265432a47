"""The Serve shell of one router: its engine, and what Serve, gateways and the supervisor ask it.

Contains no decision. Deployed by `gateway.service.application`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ray

from cluster.capacity import CapacityState, Load, ServiceSize, num_actors, present_state, resident_bytes
from cluster.capacity_watch import CapacityWatch
from cluster.memory_plan import MemoryPlan, router_names
from cluster.memory_pressure import prefer_others_as_victims
from cluster.ray_directory import RayDirectory
from cluster.resources import needs_supervisor
from cluster.router_book import RouterLoad
from cluster.trust_keeper import SupervisedTrust
from experts.budget import share_of
from experts.directory import ExpertDirectory, LocalDirectory
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from gateway.local.study import trace_service
from gateway.routers.client import RouterHealth
from gateway.service.capacity_metrics import render_capacity
from gateway.service.cluster_metrics import render_cluster
from router.errors import EngineStopped, RouterError, TraceFailed
from router.expert_use import ExpertUse
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.metrics import local_actor, render_metrics
from router.request import GenerationRequest, TokenEvent
from router.service import RouterService
from router.trace import RoutingTrace
from router.trust_options import open_local_ledger

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouterSpec:
    """What every router needs to know."""

    store_root: str
    model_name: str
    num_actors: int
    engine: EngineOptions
    memory: MemoryPlan | None = None
    """How the node's memory was divided at the start."""
    trace_folder: str | None = None
    """Where routing traces go; None means nowhere."""
    is_trace_with_tokens: bool = False
    is_capacity_auto: bool = False
    """Whether the capacity state sets how many experts stay in memory."""
    is_autoscaled: bool = False
    """Whether the supervisor is to hear of the load."""
    num_routers: int = 1
    is_placed: bool = False
    """Whether there may be actors at any time, whatever their number is now."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of processes and deployments, in their order."""
        return router_names(self.num_routers)

    @property
    def has_supervisor(self) -> bool:
        """Whether there are actors to look after, or routers that share what they learn."""
        return self.is_placed or needs_supervisor(self.num_actors, self.num_routers)

    def engine_of(self, index: int) -> EngineOptions:
        """Of one router: its part of the node's memory for experts."""
        if self.memory is None:
            return self.engine
        router = self.memory.routers[index]
        return replace(
            self.engine,
            expert_budget_bytes=router.budget_bytes,
            host_budget_bytes=self.memory.host_budget(router.process),
        )


class RouterDeployment:
    """One router: `RouterService` behind Serve."""

    async def __init__(self, spec: RouterSpec, index: int) -> None:  # type: ignore[misc]  # Serve awaits it
        prefer_others_as_victims()
        self._spec, self._index = spec, index
        self._name = spec.names[index]
        self._directory: RayDirectory | None = None
        loaded = await asyncio.to_thread(self._load_engine)
        sinks = (loaded.trust.collector,) if loaded.trust is not None else ()
        self._service = RouterService(loaded, sinks)
        self._size = _service_size(self._service.loaded, spec.num_actors)
        self._resizer = ThreadPoolExecutor(1, "capacity")  # one after another, and off the event loop
        self._capacity = CapacityWatch(self._size, self._begin_resize if spec.is_capacity_auto else None)
        self._use = ExpertUse(loaded.store.served.name, loaded.config.num_experts)
        if spec.is_autoscaled:
            self._begin_reports(loaded)
        self._trace: RoutingTrace | None = None
        if spec.trace_folder is not None:
            self._trace = trace_service(
                self._service.loaded, Path(spec.trace_folder), has_tokens=spec.is_trace_with_tokens
            )

    def _load_engine(self) -> LoadedEngine:
        spec = self._spec
        store = ExpertStore.open(Path(spec.store_root))

        def connect(worker: ExpertWorker) -> ExpertDirectory:
            if not (spec.num_actors or spec.is_placed):
                return LocalDirectory(worker)
            self._directory = RayDirectory(worker, spec.engine.audit_share)
            return self._directory

        keeper = SupervisedTrust if spec.has_supervisor else open_local_ledger
        loaded = load_engine(store, spec.engine_of(self._index), connect, keeper)
        if self._directory is not None:
            self._directory.begin()  # last: actors start meanwhile
        return loaded

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
        if self._service.is_stuck:
            raise EngineStopped("it makes no progress")

    def _observe_capacity(self) -> CapacityState:
        """Whenever Serve checks the router's health and somebody asks."""
        return self._capacity.look(self._load(), time.monotonic())

    def _load(self) -> Load:
        health = self._service.engine_thread.health()
        max_running = self._spec.engine.limits.max_running
        if not self._service.num_open:  # what else runs are probes
            return Load(0, 0, max_running)
        return Load(health.num_running, health.num_waiting, max_running)

    def _begin_reports(self, loaded: LoadedEngine) -> None:
        """Tell the supervisor of the load from now on."""
        if self._directory is not None:
            loaded.engine.watchers = (*loaded.engine.watchers, self._use)
            self._directory.report_load(self._router_load)

    def _router_load(self) -> RouterLoad:
        """On the directory's thread."""
        return RouterLoad(self._load(), self._use.take())

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

    async def submit(
        self, gateway: str, requests: Sequence[GenerationRequest]
    ) -> list[RouterError | ValueError | None]:
        """Of each, why it was refused."""
        refusals: list[RouterError | ValueError | None] = []
        for request in requests:
            try:
                self._service.submit(gateway, request)
                refusals.append(None)
            except (RouterError, ValueError) as error:
                refusals.append(error)
        # A request ends rest at once; whether it has to wait shows at a later look.
        health = self._service.engine_thread.health()
        self._look(max(1, health.num_running), max(0, health.num_waiting - 1))
        return refusals

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
        cluster = await self._cluster()
        of_router = render_metrics(self._service, cluster.get("actors", []), self._name)
        return of_router + render_cluster(cluster) + own

    async def status(self) -> dict[str, object]:
        """Plain values: the router itself, its experts, the actors and nodes."""
        service = self._service
        loaded = service.loaded
        engine = loaded.engine
        health, speech = service.engine_thread.health(), service.engine_thread.speech
        cluster = await self._cluster()
        state = self._observe_capacity()
        return {
            "model": self._spec.model_name,
            "router": {
                "pid": os.getpid(),
                "node": ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
                "numerics_class": loaded.numerics_class,
                "quantization": loaded.store.manifest.quantised.name,
                "row_multiple": loaded.kernel.row_multiple,
                "backbone_bytes": engine.backbone.nbytes,
                "kv_bytes": engine.pool.nbytes,
                "prefix_cache": engine.kv.prefix_status(),
                "experts": local_actor(service, self._name),
                "expert_calls": asdict(loaded.directory.stats()),
                "connected_actors": len(self._directory.remote.connected()) if self._directory else 0,
                "phase_seconds": dict(engine.stats.phase_seconds),
                "steps": engine.stats.steps,
                "trust": loaded.trust.status() if loaded.trust is not None else None,
                "media": asdict(loaded.media.stats) if loaded.media is not None else None,
                "speech": asdict(speech) if speech is not None else None,
                "stand_ins": loaded.stand_ins.status() if loaded.stand_ins is not None else None,
            },
            "capacity": {
                "state": state,
                "shown": present_state(state, self._size),
                "resident_bytes": resident_bytes(state, self._size),
                "actors": num_actors(state, self._size),
            },
            "actors": cluster.pop("actors", []),
            "cluster": cluster,
            "memory": self._spec.memory.as_json() if self._spec.memory else None,
            "nodes": await asyncio.to_thread(_nodes),
            "requests": {
                "running": health.num_running,
                "waiting": health.num_waiting,
                "generated_tokens": engine.stats.generated_tokens,
                "prompt_tokens": engine.stats.prompt_tokens,
            },
        }

    async def _cluster(self) -> dict[str, Any]:
        """What the supervisor tells; nothing where none runs."""
        if self._directory is None:
            return {}
        try:
            return await asyncio.to_thread(self._directory.status)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("no status of the expert actors: %s", error)
            return {}


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
