"""The Ray shell that says which nodes live, and whether one of them can be reached at all.

Ray gives a machine up only after some tens of seconds in which it does not hear of it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

REACH_TIMEOUT_S = 0.5
MAX_PROBES = 64


@dataclass(frozen=True)
class LivingNode:
    """One that Ray counts as alive."""

    address: str
    port: int
    """Of its raylet."""
    memory_bytes: int
    """That Ray counts there."""

    def is_reached(self) -> bool:
        """Whether its raylet takes a connection, which it does within a round trip where it is there."""
        return takes_connections(self.address, self.port, REACH_TIMEOUT_S)


def takes_connections(host: str, port: int, timeout_s: float) -> bool:
    """Whether somebody listens there. A process that is busy or stopped still takes them: the system does it."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True


def unreached(nodes: Mapping[str, LivingNode]) -> frozenset[str]:
    """Ids of those that cannot be reached; takes as long for many as for one."""
    if not nodes:
        return frozenset()
    with ThreadPoolExecutor(min(MAX_PROBES, len(nodes)), "reach") as pool:
        answers = pool.map(LivingNode.is_reached, nodes.values())
        return frozenset(
            node_id for node_id, is_reached in zip(nodes, answers, strict=True) if not is_reached
        )


def living_nodes() -> dict[str, LivingNode]:
    """By node id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {
        node["NodeID"]: LivingNode(
            node["NodeManagerAddress"], int(node["NodeManagerPort"]), int(node["Resources"].get("memory", 0))
        )
        for node in nodes
        if node["Alive"]
    }


def node_addresses() -> list[str]:
    """Of the nodes that live, as Ray knows them."""
    return [node.address for node in living_nodes().values()]
