"""Where there is room for one more actor, while `cluster.autoscaler` makes its decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.topology import NodeFacts


@dataclass(frozen=True)
class NodeLoad:
    """A machine at a moment."""

    node_id: str
    room_bytes: int
    """What all experts may take there, those included that are there already."""
    is_leaving: bool = False
    """Whether it is to be emptied, or was lost."""
    disk_bytes: int | None = None
    """For records of its groups. None where it has them all, or nobody knows."""
    most_actors: int | None = None
    """That may be there at once. None where memory alone bounds it."""

    @property
    def most_bytes(self) -> int | None:
        """Of all groups that it has an actor of."""
        return None if self.disk_bytes is None else max(self.room_bytes, self.disk_bytes)

    @property
    def can_read(self) -> bool:
        """Whether an actor there may keep less in memory than its group."""
        return self.disk_bytes is None or self.disk_bytes > 0


def node_load(node_id: str, room_bytes: int, facts: NodeFacts | None) -> NodeLoad:
    """facts: what is known of the machine, if anything is."""
    disk = None if facts is None or facts.has_store else facts.disk_bytes
    return NodeLoad(
        node_id, room_bytes, disk_bytes=disk, most_actors=None if facts is None else facts.most_actors
    )


class Rooms:
    """Bytes that are free on each node, kept up to date with what was decided. An actor without a node has none."""

    def __init__(
        self, nodes: Iterable[NodeLoad], groups: Iterable[ExpertGroup], sizes: Mapping[str, int]
    ) -> None:
        """sizes: bytes of each group, which an actor without a budget takes."""
        self._sizes = sizes
        self._homes = {group.name: group.home for group in groups}
        self._nodes = {node.node_id: node for node in nodes if not node.is_leaving}
        self._free = {node.node_id: node.room_bytes for node in self._nodes.values()}
        self._groups: dict[str, list[str]] = {node_id: [] for node_id in self._free}

    @classmethod
    def of(cls, nodes: Iterable[NodeLoad], plan: ServicePlan, sizes: Mapping[str, int]) -> Rooms:
        rooms = cls(nodes, plan.groups, sizes)
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

    def can_shrink(self, node_id: str | None) -> bool:
        """Whether what an actor there does not keep in memory is on its disk."""
        return node_id in self._nodes and self._nodes[node_id].can_read

    def best(self, group: str) -> str | None:
        """Of the nodes that could have an actor of the group and have none, the one with memory for most of it; of
        several its home, then the one with the most room, then the first by name."""
        size, home = self._sizes[group], self._homes.get(group)
        nodes = [
            node for node in self._free if group not in self._groups[node] and self._can_hold(node, size)
        ]
        return min(
            nodes,
            key=lambda node: (-min(size, self._free[node]), node != home, -self._free[node], node),
            default=None,
        )

    def _can_hold(self, node_id: str, num_bytes: int) -> bool:
        """Whether there is a place for one more actor, and memory and disk for all of its group."""
        most, most_actors = self._nodes[node_id].most_bytes, self._nodes[node_id].most_actors
        if most_actors is not None and len(self._groups[node_id]) >= most_actors:
            return False
        held = sum(self._sizes[group] for group in self._groups[node_id])
        return most is None or held + num_bytes <= most
