"""The capacity state in Prometheus's text. Called by `gateway.service.router_replica`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from cluster.capacity import STATES, CapacityState


def render_capacity(state: CapacityState, num_bytes: int, num_actors: int) -> str:
    """The state as one gauge a state, 1 for the present one, and what it stands for."""
    registry = CollectorRegistry()
    states = Gauge("sage_moe_capacity_state", "1 for the service's state.", ["state"], registry=registry)
    for name in STATES:
        states.labels(name).set(float(name == state))
    Gauge(
        "sage_moe_capacity_resident_bytes", "Expert bytes that the state stands for.", registry=registry
    ).set(num_bytes)
    Gauge("sage_moe_capacity_actors", "Expert actors that the state stands for.", registry=registry).set(
        num_actors
    )
    return generate_latest(registry).decode()
