"""The machines of a cluster as planning sees them: plain values, gathered from Ray, read from a file, or made up.

Rates and delays are measured where they can be, and assumed where a plan is made before there is a cluster. Read by
`cluster.placement`, `cluster.autoscaler`, the simulator and `sage-moe plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ACTORS_ON_A_CARD = 4
"""At most: an actor of the node's own group, and replicas of others. Ray gives each an equal share, whoever comes."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator of a node."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class NodeFacts:
    """One machine."""

    node_id: str
    """Ray's id of the node, or its name in a file of nodes."""
    address: str
    """Where the data plane of its actors can be reached."""
    room_bytes: int
    """What experts may take of its memory, after all else that runs there."""
    num_cores: int
    expert_bytes_s: float
    """Bytes of experts that it multiplies with one row in a second: its speed in decoding."""
    bandwidth_bytes_s: float
    """Between it and the router's node; infinite for the router's node itself, whose actors are reached by loopback."""
    round_trip_s: float
    """The least time from a call to its answer, both ends' work included. Actors on the router's own node have one too;
    the router's own worker has none."""
    disk_bytes: int = 0
    """Free for copies of expert records."""
    disk_bytes_s: float = 1e9
    """Of expert records that it reads from its disk in a second."""
    has_store: bool = False
    """Whether its disk, or one that it shares, holds the whole store."""
    numerics_class: str = ""
    """Nodes with equal classes compute equal bits. Empty where nobody has asked yet."""
    gpus: tuple[Gpu, ...] = ()
    """On which its actors compute; its room is then that of their memory."""
    behind_bytes: int = 0
    """Of host memory behind these, for experts as the store has them."""
    is_for_actors: bool = True
    """Whether replicas may come to it. False where the routers' room is on a card, which they do not share, and where
    they are on the CPU of a service whose actors are to be on cards."""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def most_actors(self) -> int | None:
        """None where memory alone bounds their number."""
        if not self.is_for_actors:
            return 0
        return ACTORS_ON_A_CARD * len(self.gpus) or None


@dataclass(frozen=True)
class Topology:
    """All machines that may take part. The router runs on `router_node`, which may hold experts like any other."""

    nodes: tuple[NodeFacts, ...]
    router_node: str

    def __post_init__(self) -> None:
        names = [node.node_id for node in self.nodes]
        if len(set(names)) != len(names):
            raise ValueError(f"node ids are not unique: {sorted(names)}")
        if self.router_node not in names:
            raise ValueError(f"the router's node {self.router_node!r} is none of {sorted(names)}")

    def node(self, node_id: str) -> NodeFacts:
        """Raises KeyError."""
        for node in self.nodes:
            if node.node_id == node_id:
                return node
        raise KeyError(node_id)
