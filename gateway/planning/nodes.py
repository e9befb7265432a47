"""From machines as a user describes them to a topology for one model: what is left for experts on each. Pure.

The same parts as `cluster.memory_plan` takes away on one machine. Called by `gateway.planning.command`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import RouterTooSmall
from cluster.memory_plan import SPARE_PERCENT
from cluster.model_sizes import ModelSizes
from cluster.topology import Gpu, NodeFacts, Topology
from experts.node_memory import NodeMemory
from gateway.planning.nodes_file import NodeEntry, NodesFile
from gateway.service.memory import MIB, SERVICE_BASE
from router.batcher import BatchLimits

WORKER_BASE_BYTES = 512 * MIB
"""Ray's own processes on a machine that only holds experts."""
ACTORS_ON_A_NODE = 2
"""For which idle memory and buffers are set aside: one for its own group and one replica of another's."""
CPU_BYTES_S = 20e9
"""What two channels of ordinary memory give, where nobody has measured a machine without GPUs."""
GPU_BYTES_S = 300e9
"""The same of each GPU."""


@dataclass(frozen=True)
class Workload:
    """What the service is planned for."""

    context: int
    """Most tokens of prompt and answer together."""
    num_streams: int

    def limits(self) -> BatchLimits:
        default = BatchLimits()
        return BatchLimits(max(default.max_batch_tokens, self.num_streams), self.num_streams)


@dataclass(frozen=True)
class RouterMemory:
    """Bytes on the router's machine beside experts."""

    backbone_bytes: int
    kv_bytes: int
    buffer_bytes: int
    process_bytes: int
    spare_bytes: int
    media_bytes: int = 0
    speech_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        parts = (self.backbone_bytes, self.kv_bytes, self.buffer_bytes, self.process_bytes, self.spare_bytes)
        return sum(parts) + self.media_bytes + self.speech_bytes


def router_memory(model: ModelSizes, workload: Workload, total_bytes: int) -> RouterMemory:
    """total_bytes: of the machine, of which a part is left to others."""
    kv_bytes = model.kv_bytes(workload.context, workload.num_streams)
    limits = workload.limits()
    return RouterMemory(
        model.backbone_bytes,
        kv_bytes,
        model.router_buffers(limits, kv_bytes),
        SERVICE_BASE.router + SERVICE_BASE.others,
        total_bytes * SPARE_PERCENT // 100,
        model.media_bytes,
        model.speech_bytes,
    )


def plan_topology(file: NodesFile, model: ModelSizes, workload: Workload) -> Topology:
    """Raises RouterTooSmall where backbone and cache do not fit on the router's machine."""
    nodes = tuple(
        _router_facts(entry, model, workload)
        if entry.name == file.router_name
        else _facts(entry, model, workload)
        for entry in file.nodes
    )
    return Topology(nodes, file.router_name)


def this_machine(name: str, memory: NodeMemory, num_cores: int) -> NodesFile:
    """The machine on which the command runs, alone, as a file of nodes would have it."""
    entry = NodeEntry.model_construct(name=name, memory=memory.available_bytes, cores=num_cores)
    return NodesFile.model_construct(router=name, nodes=(entry,))


def _router_facts(entry: NodeEntry, model: ModelSizes, workload: Workload) -> NodeFacts:
    needs = router_memory(model, workload, entry.memory)
    room = entry.memory - needs.total_bytes
    if room < 0:
        raise RouterTooSmall(
            entry.name, entry.memory, needs.total_bytes, needs.backbone_bytes, needs.kv_bytes
        )
    return _node(entry, room, has_store=entry.has_store is not False, is_router=True)


def _facts(entry: NodeEntry, model: ModelSizes, workload: Workload) -> NodeFacts:
    per_actor = SERVICE_BASE.expert_actor + model.actor_buffers(workload.limits())
    taken = WORKER_BASE_BYTES + ACTORS_ON_A_NODE * per_actor + entry.memory * SPARE_PERCENT // 100
    room = max(0, entry.memory - taken)
    if entry.gpus:
        room = sum(entry.gpus) * (100 - SPARE_PERCENT) // 100
    return _node(entry, room, has_store=entry.has_store is True, is_router=False)


def _node(entry: NodeEntry, room_bytes: int, *, has_store: bool, is_router: bool) -> NodeFacts:
    speed = entry.speed or (GPU_BYTES_S * len(entry.gpus) if entry.gpus and not is_router else CPU_BYTES_S)
    gpus = () if is_router else tuple(Gpu(f"gpu-{index}", size) for index, size in enumerate(entry.gpus))
    return NodeFacts(
        entry.name,
        entry.name,
        room_bytes,
        entry.cores,
        speed,
        float("inf") if is_router else entry.bandwidth,
        entry.round_trip,
        disk_bytes=entry.disk or 0,
        disk_bytes_s=entry.disk_speed,
        has_store=has_store,
        gpus=gpus,
    )
