"""How long a step's experts are expected to take under a plan: by what a change of the plan is judged. Pure.

The arithmetic of `cluster.forecast`, without what software takes beside messages. Called by `cluster.rebalancing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.demand import Demand
from cluster.holdings import Holding, Layer, holdings
from cluster.plan import ServicePlan
from cluster.step_time import expected_slowest, is_called, needed_experts
from cluster.topology import Topology

if TYPE_CHECKING:
    from cluster.placement import PlacementOptions


def expert_step_s(plan: ServicePlan, topology: Topology, demand: Demand, options: PlacementOptions) -> float:
    """Expected seconds of one step: each layer's slowest process, reading included, and the router's messages.

    Every expert of a process is taken to be as likely in memory as any other.
    """
    held = holdings(plan, topology, demand, has_hottest=False)
    layers = sorted({layer for holding in held for layer in holding.layers})
    return sum(_layer_s(held, layer, demand.row_bytes, options) for layer in layers)


def overflow_bytes(plan: ServicePlan, topology: Topology, demand: Demand) -> int:
    """Of experts that are in nobody's memory while nothing is lost."""
    held = holdings(plan, topology, demand)
    return sum(holding.group_bytes - holding.resident_bytes for holding in held)


def _layer_s(held: Sequence[Holding], layer: Layer, row_bytes: int, options: PlacementOptions) -> float:
    shares = [(holding.seat, holding.layers[layer]) for holding in held if layer in holding.layers]
    used = [(seat, share) for seat, share in shares if share.uses > 0]
    num_experts = sum(share.num_experts for _, share in shares)
    per_token = max(1, round(sum(share.uses for _, share in used)))
    hops, units, means, most = [], [], [], []
    messages = 0.0
    for seat, share in used:
        needed = needed_experts(share.uses, share.num_experts, options.num_streams)
        rows = share.uses * options.num_streams / needed
        missed_s = (
            share.missed / share.uses * share.expert_bytes * seat.disk_byte_s if share.missed > 0 else 0.0
        )
        hops.append(seat.hop_s(row_bytes))
        units.append(seat.expert_s(share.expert_bytes, rows * row_bytes) + missed_s)
        means.append(needed)
        most.append(min(share.num_experts, per_token * options.num_streams))
        if not seat.is_router:
            messages += is_called(share.uses, per_token, max(num_experts, per_token), options.num_streams)
    return expected_slowest(hops, units, means, most) + messages * options.message_s
