"""Made-up machines and demand for placement's tests."""

from __future__ import annotations

import numpy as np

from cluster.demand import Demand, uniform_demand
from cluster.plan import ServicePlan
from cluster.topology import NodeFacts, Topology
from extraction.manifest import ExpertKey

EXPERT_BYTES = 1000
ROW_BYTES = 16


def keys_of(layers: int, experts: int) -> list[ExpertKey]:
    return [ExpertKey("model", layer, expert) for layer in range(layers) for expert in range(experts)]


def even_demand(layers: int, experts: int, per_token: int) -> Demand:
    return uniform_demand(dict.fromkeys(keys_of(layers, experts), EXPERT_BYTES), per_token, ROW_BYTES)


def skewed_demand(layers: int, experts: int, per_token: int, seed: int = 0) -> Demand:
    """A layer's experts are used as Zipf's law has it, in a random order."""
    random = np.random.default_rng(seed)
    keys = keys_of(layers, experts)
    uses: dict[ExpertKey, float] = {}
    for layer in range(layers):
        weights = random.permutation(1.0 / np.arange(1, experts + 1))
        shares = np.minimum(1.0, weights / weights.sum() * per_token)
        uses |= {key: float(shares[key.expert]) for key in keys if key.layer == layer}
    return Demand(dict.fromkeys(keys, EXPERT_BYTES), uses, ROW_BYTES)


def node(
    name: str,
    room: int,
    *,
    speed: float = 1e9,
    round_trip_s: float = 1e-7,
    has_store: bool = False,
    disk: int = 0,
) -> NodeFacts:
    """Room in experts and a bit: what is left over is of no use."""
    room_bytes = room * EXPERT_BYTES + EXPERT_BYTES // 3
    return NodeFacts(
        name,
        f"host-{name}",
        room_bytes,
        8,
        speed,
        1e9,
        round_trip_s,
        disk_bytes=disk * EXPERT_BYTES,
        has_store=has_store,
    )


def cluster(*nodes: NodeFacts) -> Topology:
    """The first one has the router."""
    return Topology(nodes, nodes[0].node_id)


def node_of(plan: ServicePlan, topology: Topology) -> dict[ExpertKey, str]:
    """Where each expert is computed while nothing is lost."""
    nodes = dict.fromkeys(plan.router_keys, topology.router_node)
    for key, owners in plan.owners().items():
        first = next(actor for actor in plan.actors if actor.name == owners[0])
        nodes[key] = str(first.node_id)
    return nodes


def slowest_times(plan: ServicePlan, topology: Topology, demand: Demand) -> list[float]:
    """The expected time of each layer's slowest node, reading from disk left out."""
    nodes = node_of(plan, topology)
    layers = sorted({key.layer for key in nodes})
    return [
        max(
            node_time(
                topology, name, [key for key in nodes if key.layer == layer and nodes[key] == name], demand
            )
            for name in sorted(set(nodes.values()))
        )
        for layer in layers
    ]


def node_time(topology: Topology, name: str, keys: list[ExpertKey], demand: Demand) -> float:
    """A plain statement of what placement balances."""
    if not keys:
        return 0.0
    facts = topology.node(name)
    work_s = sum(demand.uses[key] * demand.sizes[key] for key in keys) / facts.expert_bytes_s
    if name == topology.router_node:
        return work_s
    link_s = demand.row_bytes / facts.bandwidth_bytes_s
    return facts.round_trip_s + link_s + work_s + sum(demand.uses[key] for key in keys) * link_s
