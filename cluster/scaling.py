"""Gathers what the autoscaler decides by, from the supervisor's last look at actors and routers. Pure.

The decisions are `cluster.autoscaler`'s; `cluster.supervisor` applies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from cluster.actor_counts import GroupLoad, ScalerState
from cluster.autoscaler import Decision, LoadSnapshot, carry_out, decide
from cluster.capacity import Capacity, Load, observe
from cluster.fleet import Fleet
from cluster.placement import share_gpus
from cluster.plan import CardShare, ExpertGroup, ServicePlan
from cluster.scaling_room import node_load
from cluster.service_spec import Scaling
from cluster.topology import Topology
from experts.group_trust import group_scores
from experts.trust import TrustSettings, TrustTable

Trust = tuple[TrustTable, TrustSettings]


class PlanScaler:
    """Changes a plan as the load changes. Times are of a monotonic clock."""

    def __init__(self, scaling: Scaling, can_add_machines: bool = True) -> None:
        """can_add_machines: see `LoadSnapshot`."""
        self._scaling, self._can_add_machines = scaling, can_add_machines
        self._state = ScalerState()
        self._capacity = Capacity("wake")
        self._looked_at_s: float | None = None
        self._busy_s: dict[tuple[str, int], float] = {}
        """By an actor's name and incarnation: what it had computed at the last look."""

    @property
    def state(self) -> str:
        """The capacity state as of the last look."""
        return self._capacity.state

    def look(
        self,
        plan: ServicePlan,
        fleet: Fleet,
        rooms: Mapping[str, int],
        trust: Trust | None,
        now_s: float,
        topology: Topology | None = None,
    ) -> tuple[ServicePlan, tuple[Decision, ...]]:
        """The plan from now on, and what was decided. Nothing changes before a router has told its load.

        rooms: by node id, what expert actors may take. topology: the machines, where the plan is made for them.
        """
        load, looked_at_s = fleet.routers.load(now_s), self._looked_at_s
        if load is None or (looked_at_s is not None and now_s - looked_at_s < self._scaling.interval_s):
            return plan, ()
        self._looked_at_s = now_s
        busy_s = self._busy_by_group(plan, fleet)
        rows = fleet.routers.take_rows({group.name: group.keys for group in plan.groups})
        self._capacity = observe(self._capacity, _at_least_one(load, rows), now_s)
        if looked_at_s is None:  # counted since nobody knows when
            return plan, ()
        elapsed_s = now_s - looked_at_s
        size = self._scaling.expert_bytes
        groups = tuple(
            GroupLoad(
                group.name,
                rows[group.name] / elapsed_s,
                busy_s[group.name] / elapsed_s,
                len(group.keys) * size,
                size,
                0.5 if trust is None else float(group_scores(*trust, group.keys).mean()),
                self._fallback_s(group),
            )
            for group in plan.groups
        )
        facts = {} if topology is None else {node.node_id: node for node in topology.nodes}
        nodes = tuple(node_load(node_id, room, facts.get(node_id)) for node_id, room in sorted(rooms.items()))
        snapshot = LoadSnapshot(
            self._capacity.state, groups, nodes, self._can_add_machines, _waiting_actors(fleet)
        )
        seen = where_it_runs(plan, fleet)
        self._state, decisions = decide(self._state, snapshot, seen, self._scaling.settings, now_s)
        scaled = carry_out(plan, decisions)
        if topology is not None:
            return share_gpus(topology, scaled), decisions
        return _share_new_cards(plan, scaled, self._scaling.card_share), decisions

    def _fallback_s(self, group: ExpertGroup) -> float:
        """See `GroupLoad`. Every expert of a token is taken to be among the group's, as far as it has so many."""
        scaling, layers = self._scaling, Counter((key.component, key.layer) for key in group.keys)
        asked = sum(min(number, scaling.experts_per_token) for number in layers.values())
        return asked * scaling.expert_bytes / scaling.read_bytes_s if scaling.read_bytes_s else float("inf")

    def _busy_by_group(self, plan: ServicePlan, fleet: Fleet) -> dict[str, float]:
        """Seconds that each group's actors computed since the last look."""
        group_of = {actor.name: actor.group for actor in plan.actors}
        busy_s = {group.name: 0.0 for group in plan.groups}
        before, self._busy_s = self._busy_s, {}
        for member in fleet.members.values():
            pulse, group = fleet.pulses.get(member.name), group_of.get(member.actor)
            if pulse is None or group is None:
                continue
            known = (member.name, member.incarnation)
            self._busy_s[known] = pulse.busy_s
            busy_s[group] += pulse.busy_s - before.get(known, pulse.busy_s)
        return busy_s


def _at_least_one(load: Load, rows: Mapping[str, int]) -> Load:
    """The load with the request that has asked for rows, where it came and went between two reports."""
    if load.num_running or load.num_waiting or not any(rows.values()):
        return load
    return replace(load, num_running=1)


def _share_new_cards(before: ServicePlan, plan: ServicePlan, share: CardShare | None) -> ServicePlan:
    """Those that were there keep what they have."""
    old = {actor.name for actor in before.actors}
    actors = (actor if actor.name in old else actor.on_card(share) for actor in plan.actors)
    return replace(plan, actors=tuple(actors))


def _waiting_actors(fleet: Fleet) -> frozenset[str]:
    """Those that wait for a machine."""
    members = fleet.members.values()
    return frozenset(m.actor for m in members if m.state == "starting" and m.is_waiting_for_node)


def where_it_runs(plan: ServicePlan, fleet: Fleet) -> ServicePlan:
    """The plan with the nodes that Ray has chosen where it was free to."""
    node_of = {member.actor: member.node_id for member in fleet.members.values() if member.state == "ready"}
    actors = (
        actor if actor.node_id else replace(actor, node_id=node_of.get(actor.name)) for actor in plan.actors
    )
    return replace(plan, actors=tuple(actors))
