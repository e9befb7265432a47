"""Where there is room for one more actor, while `cluster.autoscaler` makes its decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.plan import ActorPlan, ServicePlan


@dataclass(frozen=True)
class NodeLoad:
    """A machine at a moment."""

    node_id: str
    room_bytes: int
    """What all experts may take there, those included that are there already."""
    is_leaving: bool = False
    """Whether it is to be emptied, or was lost."""


class Rooms:
    """Bytes that are free on each node, kept up to date with what was decided. An actor without a node has none."""

    def __init__(self, nodes: Iterable[NodeLoad], sizes: Mapping[str, int]) -> None:
        """sizes: bytes of each group, which an actor without a budget takes."""
        self._sizes = sizes
        nodes = tuple(nodes)
        self._free = {node.node_id: node.room_bytes for node in nodes if not node.is_leaving}
        self._known = {node.node_id for node in nodes}
        self._groups: dict[str, list[str]] = {node_id: [] for node_id in self._free}

    @classmethod
    def of(cls, nodes: Iterable[NodeLoad], plan: ServicePlan, sizes: Mapping[str, int]) -> Rooms:
        rooms = cls(nodes, sizes)
        for actor in plan.actors:
            rooms.take(actor)
        return rooms

    def is_leaving(self, node_id: str | None) -> bool:
        """Whether what is there has to go; a node that nobody knows is gone already."""
        return node_id is not None and node_id not in self._free

    def taken_by(self, actor: ActorPlan) -> int:
        return self._sizes[actor.group] if actor.budget_bytes is None else actor.budget_bytes

    def take(self, actor: ActorPlan) -> None:
        if actor.node_id in self._free:
            self._free[actor.node_id] -= self.taken_by(actor)
            self._groups[actor.node_id].append(actor.group)

    def give_back(self, actor: ActorPlan) -> None:
        if actor.node_id in self._free:
            self._free[actor.node_id] += self.taken_by(actor)
            self._groups[actor.node_id].remove(actor.group)

    def free(self, node_id: str | None) -> int:
        """0 for a node that takes nothing more."""
        return max(0, self._free.get(node_id, 0)) if node_id is not None else 0

    def best(self, group: str) -> str | None:
        """The node with the most room that has no actor of the group yet; the first by name of several."""
        nodes = [node for node in self._free if group not in self._groups[node]]
        return min(nodes, key=lambda node: (-self._free[node], node), default=None)
