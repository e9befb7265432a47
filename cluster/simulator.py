"""A service of many machines on none: routing traces through the real policies, with measured seconds for the rest.

Placement, replicas, residency, eviction and scaling are those that serve; arithmetic, links and disks are numbers
(`Costs`, `NodeFacts`). Says what a cluster that nobody has would do, and where it would stop getting faster. Simulates
decoding: prompts, queues and the HTTP side are left out. Checked against runs by `benchmarks/bench_simulator.py`; what
follows from it is docs/scaling.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.autoscaler import (
    Decision,
    GroupLoad,
    LoadSnapshot,
    ScalerSettings,
    ScalerState,
    carry_out,
    decide,
)
from cluster.plan import ServicePlan
from cluster.scaling_room import NodeLoad
from cluster.simulated_layer import Job, Machines, layer_s
from cluster.simulated_worker import Costs, ModelShape, RouterCosts, SimulatedWorker, Work
from cluster.topology import Topology
from experts.call_times import CallTimes
from experts.replicas import choose
from experts.shares import Place
from extraction.manifest import ExpertKey

LOOK_EVERY_S = 1.0
"""How often the autoscaler looks, on the simulation's clock."""
ANSWER_TIMEOUT_S = 60.0
"""Never reached: who is slow is asked less, and who is lost is noticed."""


@dataclass(frozen=True)
class NodeEvent:
    """A node that is lost, or comes back empty. The router's own node cannot be lost."""

    at_s: float
    node_id: str
    is_lost: bool = True


@dataclass
class Report:
    """What a simulation did."""

    step_s: list[float] = field(default_factory=list)
    """Of each step."""
    router_s: float = 0.0
    """Of these, the router's own work: all but its weights, its experts and its messages."""
    messages_s: float = 0.0
    """And its work for messages. What is left are experts, links and waiting."""
    num_tokens: int = 0
    messages: int = 0
    bytes_sent: int = 0
    """Both ways."""
    uses: int = 0
    misses: int = 0
    uses_by_router: int = 0
    """Computed in the router's own process."""
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    """With the time of each."""

    @property
    def seconds(self) -> float:
        return sum(self.step_s)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.step_s else 0.0

    @property
    def hit_rate(self) -> float:
        return 1.0 - self.misses / self.uses if self.uses else 0.0

    def step_percentile_s(self, percent: float) -> float:
        return float(np.percentile(self.step_s, percent))


@dataclass
class _Share:
    """What one process is asked in one layer."""

    keys: list[ExpertKey] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0


class Simulation:
    """One service on its own clock."""

    def __init__(
        self,
        shape: ModelShape,
        topology: Topology,
        plan: ServicePlan,
        costs: Costs,
        *,
        router_budget_bytes: int | None = None,
        scaling: ScalerSettings | None = None,
        events: Sequence[NodeEvent] = (),
    ) -> None:
        """router_budget_bytes: of the router's own worker, which computes `plan.router_keys` and what no actor does;
        None for no bound. scaling: None leaves the plan as it is.

        Raises ValueError for an event about the router's node.
        """
        if any(event.node_id == topology.router_node for event in events):
            raise ValueError("the router's own node cannot be lost in a simulation")
        self.report = Report()
        self.plan = plan
        self.now_s = 0.0
        self._shape, self._costs = shape, costs
        self._nodes = {node.node_id: node for node in topology.nodes}
        self._router_node = topology.router_node
        self._scaling, self._scaler = scaling, ScalerState()
        self._events = sorted(events, key=lambda event: event.at_s)
        self._lost: set[str] = set()
        self._unnoticed: set[str] = set()
        self._looked_at_s = 0.0
        self._times = CallTimes(ANSWER_TIMEOUT_S)
        self._rows: dict[str, int] = {}
        self._busy_s: dict[str, float] = {}
        self._owned_by: tuple[ServicePlan, frozenset[str]] | None = None
        self._group_of = {key: group.name for group in plan.groups for key in group.keys}
        self._router = SimulatedWorker(shape, costs, router_budget_bytes, is_actor=False)
        self._router.warm(plan.router_keys)
        self._workers: dict[str, SimulatedWorker] = {}
        self._follow_plan(ready_at_s=0.0)
        for actor in plan.actors:
            self._workers[actor.name].warm(plan.group(actor.group).keys)

    def step(self, experts_TLK: np.ndarray) -> float:
        """Decode one token of each of T streams, whose experts are given by layer. Returns the step's seconds."""
        num_rows = len(experts_TLK)
        began_s = self.now_s
        self._take_events()
        self._scale()
        self.now_s += self._costs.weights_s + self._own_s(self._router_costs.of_step(num_rows))
        for index, layer in enumerate(self._shape.layers):
            self.now_s += self._layer_s(layer, experts_TLK[:, index])
        self.report.num_tokens += num_rows
        self.report.step_s.append(self.now_s - began_s)
        return self.now_s - began_s

    def _layer_s(self, layer: int, experts_TK: np.ndarray) -> float:
        shares = self._split(layer, experts_TK)
        noticed_s = 0.0
        if any(self._node_of[name] in self._unnoticed for name in shares if name is not None):
            noticed_s = self._costs.notice_s
            self._unnoticed.clear()
            self._refresh_owners()
            shares = self._split(layer, experts_TK)
        jobs, local_s = [], 0.0
        for name, share in sorted(shares.items(), key=lambda item: str(item[0])):
            node_id = self._router_node if name is None else self._node_of[name]
            worker = self._router if name is None else self._workers[name]
            work = worker.compute(
                share.keys,
                share.rows,
                self._nodes[node_id],
                len(self.report.step_s),
                is_crowded=node_id in self._machines.crowded,
            )
            self._count(name, share, work)
            if name is None:
                local_s = work.compute_s
            else:
                jobs.append(self._job(node_id, share, work))
                self._note(name, node_id, share, work)
        own_s = self._own_s(max(self._router_costs.of_layer(len(experts_TK)), -local_s))
        return noticed_s + own_s + layer_s(jobs, local_s, self._machines, self._costs)

    @property
    def _router_costs(self) -> RouterCosts:
        return self._costs.router(bool(self.plan.actors))

    def _own_s(self, seconds: float) -> float:
        """Of the router's own work."""
        seconds *= self._costs.work_factor(self._is_crowded)
        self.report.router_s += seconds
        return seconds

    @property
    def _is_crowded(self) -> bool:
        """Whether the router's node has more processes than cores."""
        return self._router_node in self._machines.crowded

    def _job(self, node_id: str, share: _Share, work: Work) -> Job:
        message_s = self._costs.message_s + share.rows * self._costs.message_row_s
        message_s *= self._costs.message_factor(self._is_crowded)
        self.report.messages_s += message_s
        row_bytes = self._shape.row_bytes
        return Job(node_id, work.compute_s, message_s, share.tokens * row_bytes, share.rows * row_bytes)

    def _note(self, name: str, node_id: str, share: _Share, work: Work) -> None:
        """How long an actor took, as far as a choice among replicas goes by it."""
        if self._has_replicas:
            node = self._nodes[node_id]
            nbytes = (share.tokens + share.rows) * self._shape.row_bytes
            seconds = work.compute_s + node.round_trip_s + nbytes / node.bandwidth_bytes_s
            self._times.begin(name, share.rows, len(share.keys))
            self._times.end(name, share.rows, seconds, self.now_s)

    def _split(self, layer: int, experts_TK: np.ndarray) -> dict[str | None, _Share]:
        """By process; None is the router's own. Among replicas the router that serves would choose alike."""
        experts, counts = np.unique(experts_TK, return_counts=True)
        experts, counts = experts[experts >= 0], counts[experts >= 0]
        keys = [ExpertKey(self._shape.component, layer, expert) for expert in experts.tolist()]
        owners = [self._owners.get(key) or (None,) for key in keys]
        places = choose(counts.tolist(), owners, lambda name: self._times.load(name, self.now_s))
        shares: dict[str | None, _Share] = {}
        for key, count, name in zip(keys, counts.tolist(), places, strict=True):
            share = shares.setdefault(name, _Share())
            share.keys.append(key)
            share.rows += count
        chosen = dict(zip(experts.tolist(), places, strict=True))
        names = list(shares)
        if names in ([], [None]):
            return shares
        place = {name: index for index, name in enumerate(names)}
        owner_of_E = np.full(int(experts[-1]) + 1, -1)
        for expert, name in chosen.items():
            owner_of_E[expert] = place[name]
        owner_TK = np.where(experts_TK >= 0, owner_of_E[experts_TK], -1)
        for name, index in place.items():
            shares[name].tokens = int((owner_TK == index).any(axis=1).sum())
        return shares

    def _count(self, name: str | None, share: _Share, work: Work) -> None:
        report = self.report
        report.uses += work.uses
        report.misses += work.misses
        if name is None:
            report.uses_by_router += work.uses
        else:
            report.messages += 1
            report.bytes_sent += (share.tokens + share.rows) * self._shape.row_bytes
            group = self._group_of[share.keys[0]]
            self._busy_s[group] = self._busy_s.get(group, 0.0) + work.compute_s
        for key in share.keys:
            if key in self._group_of:
                group = self._group_of[key]
                self._rows[group] = self._rows.get(group, 0) + share.rows // len(share.keys)

    def _take_events(self) -> None:
        while self._events and self._events[0].at_s <= self.now_s:
            event = self._events.pop(0)
            if event.is_lost:
                self._lost.add(event.node_id)
                self._unnoticed.add(event.node_id)
            else:
                self._lost.discard(event.node_id)
                for actor in self.plan.actors:
                    if actor.node_id == event.node_id:
                        ready_at_s = self.now_s + self._costs.start_s
                        self._workers[actor.name] = self._new_worker(actor.budget_bytes, ready_at_s)
        self._refresh_owners()

    def _scale(self) -> None:
        elapsed_s = self.now_s - self._looked_at_s
        if self._scaling is None or elapsed_s < LOOK_EVERY_S:
            return
        snapshot = LoadSnapshot("focus", self._group_loads(elapsed_s), self._node_loads())
        self._scaler, decisions = decide(self._scaler, snapshot, self.plan, self._scaling, self.now_s)
        self.report.decisions.extend((self.now_s, decision) for decision in decisions)
        self.plan = carry_out(self.plan, decisions)
        self._follow_plan(ready_at_s=self.now_s + self._costs.start_s)
        self._looked_at_s, self._rows, self._busy_s = self.now_s, {}, {}

    def _group_loads(self, elapsed_s: float) -> tuple[GroupLoad, ...]:
        nbytes = self._shape.expert_bytes
        return tuple(
            GroupLoad(
                group.name,
                self._rows.get(group.name, 0) / elapsed_s,
                self._busy_s.get(group.name, 0.0) / elapsed_s,
                len(group.keys) * nbytes,
                nbytes,
            )
            for group in self.plan.groups
        )

    def _node_loads(self) -> tuple[NodeLoad, ...]:
        return tuple(
            NodeLoad(
                node.node_id,
                node.room_bytes,
                node.node_id in self._lost - self._unnoticed,
                most_actors=node.most_actors,
            )
            for node in self._nodes.values()
        )

    def _follow_plan(self, ready_at_s: float) -> None:
        for actor in self.plan.actors:
            if actor.name not in self._workers:
                is_waiting = (
                    actor.node_id is None and self._scaling is not None
                )  # for a machine that never comes
                ready_s = float("inf") if is_waiting else ready_at_s
                self._workers[actor.name] = self._new_worker(actor.budget_bytes, ready_s)
            elif actor.budget_bytes is not None:
                self._workers[actor.name].set_budget(actor.budget_bytes)
        self._refresh_owners()

    def _new_worker(self, budget_bytes: int | None, ready_at_s: float) -> SimulatedWorker:
        return SimulatedWorker(self._shape, self._costs, budget_bytes, ready_at_s=ready_at_s)

    def _refresh_owners(self) -> None:
        """Who takes rows now. A node whose loss nobody has noticed is still asked."""
        away = self._lost - self._unnoticed
        placed = {actor.name: actor.node_id or self._router_node for actor in self.plan.actors}
        ready = frozenset(
            name
            for name, node_id in placed.items()
            if node_id not in away and self._workers[name].ready_at_s <= self.now_s
        )
        if self._owned_by == (self.plan, ready):
            return
        self._owned_by, self._node_of = (self.plan, ready), placed
        processes = Counter([self._router_node, *placed.values()])
        crowded = (
            node_id
            for node_id, count in processes.items()
            if count * self._costs.threads > self._nodes[node_id].num_cores
        )
        self._machines = Machines(self._nodes, self._router_node, frozenset(crowded))
        self._owners: dict[ExpertKey, tuple[Place, ...]] = {
            key: tuple(name for name in names if name in ready) for key, names in self.plan.owners().items()
        }
        self._has_replicas = any(len(names) > 1 for names in self._owners.values())
        self._times.keep_only(placed)
