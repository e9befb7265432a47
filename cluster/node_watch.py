"""The machines that a plan may use, as they come and go, and the plan that follows from it.

A machine that joins is asked what it is, on a thread beside the supervisor's, and again after a while where it cannot
take part; one that is lost is left out at once. The decision is `cluster.replanning`'s. Used by `cluster.supervisor` on
its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from cluster.node_report import NodeReport, StoreQuestion
from cluster.node_rooms import facts_of
from cluster.plan import ServicePlan
from cluster.ray_topology import gather
from cluster.replanning import place_again
from cluster.service_spec import Placing
from cluster.topology import NodeFacts, Topology

ASK_AGAIN_S = 60.0
"""A machine that could not take part."""

Ask = Callable[[StoreQuestion, Collection[str]], Sequence[NodeReport]]
"""What a store's question is answered by the nodes of these ids."""


@dataclass(frozen=True)
class PlanChange:
    """Another plan, the machines that it is for, and why."""

    plan: ServicePlan
    topology: Topology
    reason: str


class NodeWatch:
    """Times are of a monotonic clock, in seconds."""

    def __init__(
        self, placing: Placing, topology: Topology, ask: Ask = gather, *, is_scaled: bool = False
    ) -> None:
        """topology: the machines that the plan was last made for. is_scaled: see `place_again`."""
        self._placing, self._ask, self._is_scaled = placing, ask, is_scaled
        self._planned = topology
        self._facts = {node.node_id: node for node in topology.nodes}
        self._refused_at_s: dict[str, float] = {}
        self._reasons: dict[str, str] = {}
        self._told: dict[str, str] = {}
        self._asked: dict[str, Future[Sequence[NodeReport]]] = {}
        self._pool = ThreadPoolExecutor(1, "node-watch")

    @property
    def topology(self) -> Topology:
        """The machines that the plan was last made for."""
        return self._planned

    def rooms(self, alive: Collection[str], plan: ServicePlan) -> dict[str, int]:
        """Bytes that expert actors may take on each node that lives and is known to be of use."""
        rooms = {node_id: facts.room_bytes for node_id, facts in self._facts.items() if node_id in alive}
        router = self._placing.topology.router_node
        if router in rooms:
            rooms[router] -= plan.router_budget_bytes or 0
        # One that is not known yet has no room, and may keep what it has.
        return rooms | {node_id: 0 for node_id in alive if node_id not in rooms and _is_used(node_id, plan)}

    def look(self, usable: Collection[str], plan: ServicePlan, now_s: float) -> PlanChange | None:
        """usable: ids of the nodes that live and are trusted. plan: with the nodes where its actors run. None where the
        machines are those that the plan was made for."""
        self._take_answers(now_s)
        return self._decide(frozenset(usable), plan)

    def find(self, alive: Collection[str], now_s: float) -> None:
        """Ask the nodes that nobody knows, and forget those that are gone."""
        self._refused_at_s = {name: at_s for name, at_s in self._refused_at_s.items() if name in alive}
        self._told = {name: reason for name, reason in self._told.items() if name in alive}
        for node_id in sorted(set(alive) - self._facts.keys() - self._asked.keys()):
            refused_at_s = self._refused_at_s.get(node_id)
            if refused_at_s is None or now_s - refused_at_s >= ASK_AGAIN_S:
                self._asked[node_id] = self._pool.submit(self._ask, self._placing.question, (node_id,))

    def take_refusals(self) -> dict[str, str]:
        """Why nodes cannot take part, by id; each once for each reason."""
        new = {name: reason for name, reason in self._reasons.items() if self._told.get(name) != reason}
        self._told |= new
        self._reasons = {}
        return new

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take_answers(self, now_s: float) -> None:
        for node_id, asked in list(self._asked.items()):
            if not asked.done():
                continue
            del self._asked[node_id]
            facts = self._facts_of(asked)
            if isinstance(facts, NodeFacts):
                self._facts[node_id] = facts
            else:
                self._refused_at_s[node_id], self._reasons[node_id] = now_s, facts

    def _facts_of(self, asked: Future[Sequence[NodeReport]]) -> NodeFacts | str:
        error = asked.exception()
        if error is not None:
            return f"it could not be asked: {error}"[:300]
        reports = asked.result()
        return facts_of(reports[0], self._placing.rules) if reports else "it left before it answered"

    def _decide(self, usable: frozenset[str], plan: ServicePlan) -> PlanChange | None:
        if not usable:
            return None  # whoever told that has not seen this machine, either
        router = self._planned.router_node
        # The routers' own machine is there for as long as anybody looks: not trusted, it is one without room.
        here = self._facts[router] if router in usable else replace(self._facts[router], room_bytes=0)
        others = (facts for node_id, facts in self._facts.items() if node_id in usable and node_id != router)
        nodes = (here, *others)
        now, before = {node.node_id for node in nodes}, {node.node_id for node in self._planned.nodes}
        if now == before:
            return None
        topology = Topology(nodes, router)
        placing = self._placing
        again = place_again(
            topology, placing.demand, plan, placing.options, now - before, is_scaled=self._is_scaled
        )
        self._planned = topology
        return PlanChange(again, topology, _why(before - now, now - before))


def _is_used(node_id: str, plan: ServicePlan) -> bool:
    return any(actor.node_id == node_id for actor in plan.actors)


def _why(lost: Collection[str], joined: Collection[str]) -> str:
    parts = [f"node {node_id[:12]} was lost" for node_id in sorted(lost)]
    return ", ".join(parts + [f"node {node_id[:12]} joined" for node_id in sorted(joined)])
