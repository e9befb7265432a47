"""What `sage-moe plan` says: a plan, its forecast, a verdict, and the command that starts it. Plain values.

Made here from a model, machines and demand; printed by `gateway.planning.view`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.demand import Demand
from cluster.forecast import Forecast, count_copies, forecast
from cluster.placement import Grouping, PlacementOptions, place
from cluster.plan import ServicePlan
from cluster.topology import NodeFacts, Topology
from extraction.quantised_parts import NOT_QUANTISED
from gateway.byte_sizes import UNITS, format_bytes
from gateway.planning.nodes import RouterMemory, Workload, router_memory
from gateway.planning.source import PlannedModel
from gateway.service.option_values import option_names
from gateway.stores.quantise_options import option_words


@dataclass(frozen=True)
class NodeReport:
    """One machine. Bytes, and per token of one stream."""

    node: str
    is_router: bool
    room_bytes: int
    """For experts, beside all else."""
    resident_bytes: int
    """Of the experts that it answers for, in memory."""
    disk_bytes: int
    """Of those, on its disk."""
    replica_bytes: int
    """Of other machines' experts, in memory."""
    left_bytes: int
    num_experts: int
    messages: float
    bytes: float
    compute_s: float


@dataclass(frozen=True)
class PlanReport:
    """Everything that is printed."""

    source: str
    dtype: str
    experts: str
    """Their form: the dtype, or how they are quantised."""
    quantization: str | None
    """Of all parts, as answers name it."""
    num_experts: int
    expert_bytes: int
    total_expert_bytes: int
    context: int
    num_streams: int
    grouping: Grouping
    router_memory: RouterMemory
    nodes: tuple[NodeReport, ...]
    forecast: Forecast
    other_grouping: Forecast
    """With the other way of dividing experts."""
    context_left: int
    """Tokens that each stream could have if what is free on the router's machine went to the cache."""
    num_single_copies: int
    num_unsafe: int
    verdict: str
    notes: tuple[str, ...]
    commands: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_report(
    model: PlannedModel,
    topology: Topology,
    demand: Demand,
    workload: Workload,
    choices: ServeChoices,
    memory_bytes: int = 0,
    names: Mapping[str, str] | None = None,
) -> PlanReport:
    """memory_bytes: of the router's machine. names: of machines that were asked, by node id; None where they were
    described. Raises NoRoomForExperts."""
    grouping = choices.grouping
    sizes = model.sizes
    options = PlacementOptions(grouping, workload.num_streams)
    other: Grouping = "layer" if grouping == "expert" else "expert"
    plan = place(topology, demand, None, options)
    foretold, elsewise = (
        forecast(chosen, topology, demand, sizes, num_streams=workload.num_streams, context=workload.context)
        for chosen in (plan, place(topology, demand, None, replace(options, grouping=other)))
    )
    called = names or {}
    nodes = tuple(
        replace(_node(node, plan, topology, demand, foretold), node=called.get(node.node_id, node.node_id))
        for node in topology.nodes
    )
    router = next(node for node in nodes if node.is_router)
    memory = router_memory(sizes, workload, memory_bytes)
    copies = count_copies(plan, topology)
    dtype = str(sizes.dtype).removeprefix("torch.")
    return PlanReport(
        source=model.source,
        dtype=dtype,
        experts=model.quantised.experts.name if model.quantised.experts else dtype,
        quantization=model.quantised.name,
        num_experts=sizes.num_experts,
        expert_bytes=sizes.expert_bytes,
        total_expert_bytes=sizes.total_expert_bytes,
        context=workload.context,
        num_streams=workload.num_streams,
        grouping=grouping,
        router_memory=memory,
        nodes=nodes,
        forecast=foretold,
        other_grouping=elsewise,
        context_left=sizes.context_in(memory.kv_bytes + router.left_bytes, workload.num_streams),
        num_single_copies=len(copies.single),
        num_unsafe=len(copies.unsafe),
        verdict=_verdict(nodes, foretold),
        notes=_notes(topology, len(copies.unsafe), is_described=names is None),
        commands=commands_for(model, workload, memory.kv_bytes, choices),
    )


def _node(
    node: NodeFacts, plan: ServicePlan, topology: Topology, demand: Demand, foretold: Forecast
) -> NodeReport:
    is_router = node.node_id == topology.router_node
    mine = [process for process in foretold.processes if process.node_id == node.node_id]
    names = {process.name for process in mine}
    replicas = [
        actor.budget_bytes or 0
        for actor in plan.actors
        if actor.node_id == node.node_id and actor.name not in names
    ]
    groups = [plan.group(actor.group).keys for actor in plan.actors if actor.name in names]
    keys = [key for group in groups for key in group] + (list(plan.router_keys) if is_router else [])
    resident = sum(process.resident_bytes for process in mine)
    return NodeReport(
        node.node_id,
        is_router,
        node.room_bytes,
        resident,
        sum(demand.sizes[key] for key in keys) - resident,
        sum(replicas),
        node.room_bytes - resident - sum(replicas),
        len(keys),
        sum(process.traffic.messages for process in mine),
        sum(process.traffic.bytes for process in mine),
        sum(process.compute_s for process in mine),
    )


def _verdict(nodes: Sequence[NodeReport], foretold: Forecast) -> str:
    on_disk = sum(node.disk_bytes for node in nodes)
    if not on_disk:
        return "fits: every expert is in memory"
    in_memory = sum(node.resident_bytes for node in nodes)
    share = in_memory / (in_memory + on_disk)
    return (
        f"runs from disk: {share:.0%} of the experts' bytes are in memory, and {foretold.miss_rate:.0%} of uses are "
        "read from disk if the most used ones stay there"
    )


def _notes(topology: Topology, num_unsafe: int, *, is_described: bool) -> tuple[str, ...]:
    notes = []
    if num_unsafe:
        notes.append(
            f"not failover-safe: {num_unsafe} experts are on one machine only, in memory or on disk; when it is lost, "
            "nobody can compute them"
        )
    if any(node.gpus for node in topology.nodes):
        notes.append(
            "experts on GPUs are not yet run on one (docs/memory.md); serve uses one GPU of each machine"
        )
    if is_described and len(topology.nodes) > 1:
        notes.append(
            "serve measures the machines itself; node-budgets (docs/placement.md) hold it to what is described here"
        )
    return tuple(notes)


@dataclass(frozen=True)
class ServeChoices:
    """What a plan is made for beside its workload, as `serve` is to be told."""

    address: str | None = None
    """Of the cluster; None for one machine."""
    grouping: Grouping = "expert"
    demand: str | None = None
    expert_device: str | None = None
    """None for the default."""
    store_cache: str | None = None
    """Where machines without the store keep what they fetch; None where all have it."""


def serve_options(
    model: PlannedModel, workload: Workload, kv_bytes: int, choices: ServeChoices
) -> dict[str, str]:
    """Options of `serve` that start what is planned; those at their defaults are left out."""
    options = {
        "kv-budget": format_bytes(_whole_mib(kv_bytes)),
        "max-model-len": str(workload.context),
        "max-num-seqs": str(workload.num_streams),
    }
    if model.dtype_option is not None:
        options["dtype"] = model.dtype_option
    if choices.address is not None:
        options["address"] = choices.address
        if choices.grouping != "expert":
            options["grouping"] = choices.grouping
        if choices.demand is not None:
            options["demand"] = choices.demand
        if choices.expert_device is not None:
            options["expert-device"] = choices.expert_device
        if choices.store_cache is not None:
            options["store-cache"] = choices.store_cache
    assert options.keys() <= set(option_names())
    return options


def commands_for(
    model: PlannedModel, workload: Workload, kv_bytes: int, choices: ServeChoices
) -> tuple[str, ...]:
    """What to type: the extraction that quantises, where it is needed, and `serve`."""
    source = model.source
    commands = []
    if model.quantised != NOT_QUANTISED and not model.is_quantised:
        words = ["sage-moe", "extract", source, "STORE", *option_words(model.quantised)]
        commands.append(shlex.join(words))
        source = "STORE"
    options = serve_options(model, workload, kv_bytes, choices)
    words = ["sage-moe", "serve", source]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    words += [] if model.has_speech else ["--no-speech"]
    return (*commands, shlex.join(words))


def _whole_mib(num_bytes: int) -> int:
    mib = UNITS["mib"]
    return -(-num_bytes // mib) * mib
