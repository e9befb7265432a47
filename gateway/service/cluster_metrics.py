"""The supervisor's Prometheus metrics: expert actors by state, and what waits for a machine. Called by
`gateway.service.router_replica`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from cluster.members import MemberState

STATES = ("waiting", *get_args(MemberState))


def render_cluster(cluster: Mapping[str, Any]) -> str:
    """cluster: what `Supervisor.status` tells. Empty where there is none."""
    if not cluster:
        return ""
    registry = CollectorRegistry()
    actors = Gauge("sage_moe_expert_actors", "Expert actors by state.", ["state"], registry=registry)
    counts = Counter(entry["state"] for entry in cluster["actors"])
    for state in STATES:
        actors.labels(state).set(counts[state])
    pending = Gauge(
        "sage_moe_expert_actors_pending", "Expert actors that wait for a machine.", registry=registry
    )
    pending.set(len(cluster["pending"]))
    return generate_latest(registry).decode()
