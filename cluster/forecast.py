"""What a plan will give: messages, bytes, the network's and the weights' share of a token, tokens/s, single copies.

Small functions over plain values, for `sage-moe plan`, the simulator and whoever compares plans. Formulas, and how far
the result is from measurements: docs/placement.md. Rates are those of the topology; what software takes beside them are
the simulator's `Costs`. Does not promise a token rate: it states a range and what it assumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.demand import Demand
from cluster.holdings import Holding, Layer, holdings
from cluster.model_sizes import ModelSizes
from cluster.plan import ServicePlan
from cluster.simulated_worker import Costs, RouterCosts
from cluster.step_time import MESSAGE_S, expected_slowest, is_called, needed_experts
from cluster.topology import Topology
from experts.frame import HEADER_BYTES
from extraction.manifest import ExpertKey

INDEX_BYTES = 4
"""Of every number in a call's body: experts, counts, row map (docs/wire-format.md)."""
SLOW_FACTOR = 1.5
"""Between a quiet machine and the same machine with others at work, as measured here."""


def typical_costs(num_layers: int) -> Costs:
    """Seconds that software takes beside weights and wires, for a model of so many layers; rates are infinite, since
    those are the topology's. As measured on one machine of two cores (docs/placement.md)."""
    row_s = 0.02e-3 + num_layers * 0.007e-3
    return Costs(
        RouterCosts(0.15e-3 + num_layers * 0.03e-3, row_s, -0.055e-3, 0.0),
        RouterCosts(0.15e-3 + num_layers * 0.03e-3, row_s, 0.005e-3, 0.0015e-3),
        call_s=0.035e-3,
        expert_s=0.002e-3,
        expert_row_s=0.0004e-3,
        message_s=MESSAGE_S,
        frame_s=0.01e-3,
        actor_factor=0.8,
        crowded_messages=3.3,
        overlap=0.32,
    )


@dataclass(frozen=True)
class Traffic:
    """Between the router and one process, or all of them, per token."""

    messages: float
    """Calls; each has an answer."""
    bytes: float
    """Both ways, frames included."""


@dataclass(frozen=True)
class ProcessForecast:
    """One process."""

    name: str
    node_id: str
    group_bytes: int
    resident_bytes: int
    uses: float
    """Expected experts per token, of all layers."""
    missed: float
    compute_s: float
    """Of its own per token, reading not included."""
    traffic: Traffic


@dataclass(frozen=True)
class Forecast:
    """What a plan will give, per token of one stream where nothing else is said."""

    processes: tuple[ProcessForecast, ...]
    traffic: Traffic
    messages_per_layer: float
    network_floor_s: float
    """Round trips and bytes on the slowest way, layer after layer: no code is faster than that."""
    backbone_s: float
    expert_s: float
    """The slowest process of every layer, reading of hottest-first misses included."""
    miss_rate: float
    """Of all uses, with the most used experts in memory."""
    tokens_per_s: tuple[float, float]
    """Low and high, of all streams together."""


def forecast(
    plan: ServicePlan,
    topology: Topology,
    demand: Demand,
    model: ModelSizes,
    *,
    num_streams: int = 1,
    context: int = 0,
    costs: Costs | None = None,
) -> Forecast:
    """num_streams: tokens computed together in a step. context: positions that attention reads for each.

    High: the most used experts stay in memory, nothing else runs, half of the context is there. Low: every expert is as
    likely in memory as any other, all of the context is there, and everything takes SLOW_FACTOR as long.
    """
    costs = costs or typical_costs(model.config.num_layers)
    held, unsure = (holdings(plan, topology, demand, has_hottest=is_sure) for is_sure in (True, False))
    processes = tuple(_process(holding, model, num_streams) for holding in held)
    traffic = total_traffic([process.traffic for process in processes])
    speed = topology.node(topology.router_node).expert_bytes_s
    kv_s = model.kv_bytes_per_token * context * num_streams / speed
    backbone_s = model.active_bytes / speed
    layers = sorted({layer for holding in held for layer in holding.layers})
    expert_s = sum(layer_time_s(held, layer, model, costs, num_streams) for layer in layers)
    unsure_s = sum(layer_time_s(unsure, layer, model, costs, num_streams) for layer in layers)
    fixed_s = _router_s(held, traffic, costs, num_streams, len(layers), expert_s)
    high = num_streams / (fixed_s + backbone_s + kv_s / 2 + expert_s)
    low = num_streams / (SLOW_FACTOR * (fixed_s + backbone_s + kv_s + unsure_s))
    uses = sum(process.uses for process in processes)
    return Forecast(
        processes,
        traffic,
        traffic.messages / max(1, len(layers)),
        sum(network_time_s(held, layer, model, num_streams) for layer in layers) / num_streams,
        backbone_s,
        expert_s,
        sum(process.missed for process in processes) / uses if uses else 0.0,
        (low, high),
    )


def _router_s(
    held: Sequence[Holding],
    traffic: Traffic,
    costs: Costs,
    num_streams: int,
    num_layers: int,
    expert_s: float,
) -> float:
    """What a step takes of the router's process beside weights, keys and values: its own work, and messages. expert_s:
    of the slowest processes of all layers, from which work that is saved is taken."""
    is_crowded = held[0].is_crowded(costs.threads)
    own = costs.router(len(held) > 1)
    own_s = own.of_step(num_streams) + max(num_layers * own.of_layer(num_streams), -expert_s)
    rows = sum(share.uses for holding in held[1:] for share in holding.layers.values())
    messages_s = num_streams * (traffic.messages * costs.message_s + rows * costs.message_row_s)
    return own_s * costs.work_factor(is_crowded) + messages_s * costs.message_factor(is_crowded)


def layer_time_s(
    held: Sequence[Holding], layer: Layer, model: ModelSizes, costs: Costs, num_streams: int
) -> float:
    """Expected time of the slowest process of one layer in a step: hop, weights, reading, answers."""
    hops, units, means, most = [], [], [], []
    for holding in held:
        share = holding.layers.get(layer)
        if share is None or share.uses <= 0:
            continue
        needed = needed_experts(share.uses, share.num_experts, num_streams)
        rows = share.uses * num_streams / needed
        is_crowded = holding.is_crowded(costs.threads)
        factor = 1.0 if holding.seat.is_router else costs.actor_factor
        factor *= costs.work_factor(is_crowded) * _waiting(holding, costs)
        software_s = factor * (costs.expert_s + (rows - 1.0) * costs.expert_row_s)
        unit = software_s + holding.seat.expert_s(share.expert_bytes, rows * model.row_bytes)
        missed = share.missed / share.uses
        if missed > 0:
            unit += missed * share.expert_bytes * holding.seat.disk_byte_s
        asked = int(_asked_rows(share.uses, model, num_streams) * model.row_bytes)
        frame_s = 0.0 if holding.seat.is_router else costs.frame_s * costs.message_factor(is_crowded)
        hops.append(holding.seat.hop_s(asked) + frame_s + factor * costs.call_s)
        units.append(unit)
        means.append(needed)
        most.append(min(share.num_experts, model.config.experts_per_token * num_streams))
    return expected_slowest(hops, units, means, most)


def _waiting(holding: Holding, costs: Costs) -> float:
    """How many times as long a process takes for its work since others of its node want the same cores."""
    together = max(1.0, holding.beside * costs.threads / holding.num_cores)
    if not holding.is_crowded(costs.threads):
        return together
    return costs.overlap * together + (1.0 - costs.overlap) * holding.beside


def network_time_s(held: Sequence[Holding], layer: Layer, model: ModelSizes, num_streams: int) -> float:
    """The same with processes that compute in no time: what the network alone takes in a step."""
    hops, units, means, most = [], [], [], []
    for holding in held:
        share = holding.layers.get(layer)
        if holding.seat.is_router or share is None or share.uses <= 0:
            continue
        needed = needed_experts(share.uses, share.num_experts, num_streams)
        rows = share.uses * num_streams / needed
        hops.append(holding.seat.hop_s(int(_asked_rows(share.uses, model, num_streams) * model.row_bytes)))
        units.append(holding.seat.link_byte_s * rows * model.row_bytes)
        means.append(needed)
        most.append(min(share.num_experts, model.config.experts_per_token * num_streams))
    return expected_slowest(hops, units, means, most)


def layer_traffic(uses: float, num_experts: int, model: ModelSizes, num_streams: int) -> Traffic:
    """Of one layer and one process, per token. uses: expected experts per token that the process computes."""
    called = is_called(uses, model.config.experts_per_token, model.config.num_experts, num_streams)
    rows = uses * num_streams
    tokens = called * _asked_rows(uses, model, num_streams)
    asked = called * HEADER_BYTES + tokens * model.row_bytes + rows * INDEX_BYTES
    asked += 2 * INDEX_BYTES * needed_experts(uses, num_experts, num_streams)
    answered = called * HEADER_BYTES + rows * model.row_bytes
    return Traffic(called / num_streams, (asked + answered) / num_streams)


def total_traffic(parts: Sequence[Traffic]) -> Traffic:
    return Traffic(sum(part.messages for part in parts), sum(part.bytes for part in parts))


def _asked_rows(uses: float, model: ModelSizes, num_streams: int) -> float:
    """Token rows of a call that is made at all."""
    shape = (model.config.experts_per_token, model.config.num_experts)
    one, any_one = is_called(uses, *shape), is_called(uses, *shape, num_streams)
    return num_streams * one / any_one if any_one else 0.0


def _process(holding: Holding, model: ModelSizes, num_streams: int) -> ProcessForecast:
    shares = holding.layers.values()
    calls = [layer_traffic(share.uses, share.num_experts, model, num_streams) for share in shares]
    traffic = Traffic(0.0, 0.0) if holding.seat.is_router else total_traffic(calls)
    return ProcessForecast(
        holding.name,
        holding.seat.node_id,
        holding.group_bytes,
        holding.resident_bytes,
        sum(share.uses for share in shares),
        sum(share.missed for share in shares),
        sum(share.uses * share.expert_bytes for share in shares) * holding.seat.byte_s,
        traffic,
    )


@dataclass(frozen=True)
class Copies:
    """On how many machines experts are, in memory or on disk."""

    single: tuple[ExpertKey, ...]
    """On one machine only."""
    unsafe: tuple[ExpertKey, ...]
    """Of those, the ones whose machine is not the router's: when it is lost, no answer can be computed."""


def count_copies(plan: ServicePlan, topology: Topology) -> Copies:
    """A node has what its actors answer for, and everything where it has the whole store."""
    stores = frozenset(node.node_id for node in topology.nodes if node.has_store)
    nodes: dict[ExpertKey, set[str]] = {key: {topology.router_node} for key in plan.router_keys}
    hosts: dict[str, set[str]] = {group.name: set() for group in plan.groups}
    for actor in plan.actors:
        hosts[actor.group].add(actor.node_id or topology.router_node)
    for group in plan.groups:
        nodes |= dict.fromkeys(group.keys, hosts[group.name])
    return _sorted_copies({key: found | stores for key, found in nodes.items()}, topology.router_node)


def _sorted_copies(nodes: Mapping[ExpertKey, frozenset[str] | set[str]], router: str) -> Copies:
    single = sorted(key for key, found in nodes.items() if len(found) < 2)
    return Copies(tuple(single), tuple(key for key in single if router not in nodes[key]))
