"""What the supervisor tells people: actors, the plan, what waits, and what was decided. Plain values. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.disk_desk import DiskDecision
from cluster.expert_names import by_layer
from cluster.fleet import Note
from cluster.members import Backoffs, Member
from cluster.plan import ServicePlan


def actor_entries(
    plan: ServicePlan,
    members: Sequence[Member],
    backoffs: Backoffs,
    told: Mapping[str, Mapping[str, Any]],
    now_s: float,
) -> list[dict[str, Any]]:
    """One entry an actor, in the plan's order, then those that are on their way out. told: what actors say of
    themselves, by name. An actor of the plan that nobody is yet has an entry of its own."""
    order = {actor.name: index for index, actor in enumerate(plan.actors)}
    known = {member.actor for member in members}
    entries = [_entry(plan, member, backoffs, told.get(member.name), now_s) for member in members]
    for actor in plan.actors:
        if actor.name not in known:
            backoff = backoffs.get(actor.name)
            entry = {
                "name": actor.name,
                "actor": actor.name,
                "state": "waiting",
                **_of_plan(plan, actor.name),
            }
            entries.append(entry | {"last_error": backoff.error if backoff else ""})
    return sorted(entries, key=lambda entry: (order.get(entry["actor"], len(order)), entry["name"]))


def _entry(
    plan: ServicePlan,
    member: Member,
    backoffs: Backoffs,
    told: Mapping[str, Any] | None,
    now_s: float,
) -> dict[str, Any]:
    backoff = backoffs.get(member.actor)
    planned = _of_plan(plan, member.actor)
    # It may have started with more experts than it answers for by now.
    size = min(len(member.keys), planned["group"] or len(member.keys))
    entry: dict[str, Any] = {
        "name": member.name,
        "actor": member.actor,
        "state": member.state,
        "seconds_in_state": round(now_s - member.since_s, 1),
        "incarnation": member.incarnation,
        "last_error": member.error or (backoff.error if backoff else ""),
        **planned,
    }
    if member.endpoint is not None:
        entry["node"] = member.endpoint.host
    if member.node_id is not None:
        entry["node_id"] = member.node_id[:12]
    return entry | dict(told or {}) | {"group": size}


def _of_plan(plan: ServicePlan, name: str) -> dict[str, Any]:
    """Of one of the plan's actors: its group and its place among the group's replicas."""
    actor = next((actor for actor in plan.actors if actor.name == name), None)
    if actor is None:
        return {"group": 0, "group_name": "", "replica": 0}
    replicas = [other.name for other in plan.actors if other.group == actor.group]
    size = len(plan.group(actor.group).keys)
    return {"group": size, "group_name": actor.group, "replica": replicas.index(name)}


def plan_entry(plan: ServicePlan) -> dict[str, Any]:
    """The plan in a few numbers and its actors; the experts of groups are counted only."""
    return {
        "groups": {group.name: len(group.keys) for group in plan.groups},
        "router_experts": len(plan.router_keys),
        "actors": [
            {
                "actor": actor.name,
                "group": actor.group,
                "node_id": actor.node_id,
                "budget_bytes": actor.budget_bytes,
                "gpus": actor.num_gpus,
            }
            for actor in plan.actors
        ],
    }


def pending_entries(members: Sequence[Member]) -> list[dict[str, Any]]:
    """What Ray was asked for and no node has."""
    return [
        {"name": member.name, "actor": member.actor, "memory_bytes": member.budget_bytes or 0}
        for member in members
        if member.is_waiting_for_node
    ]


def disks_entry(decision: DiskDecision) -> dict[str, Any]:
    """Experts that are lost with one machine, by layer."""
    return {
        "is_failover_safe": not (decision.single or decision.absent),
        "single_copies": by_layer(decision.single),
        "absent": by_layer(decision.absent),
    }


def note_entries(notes: Sequence[Note]) -> list[dict[str, Any]]:
    return [
        {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
            "kind": kind,
            "name": name,
            "reason": reason,
        }
        for at, kind, name, reason in notes
    ]
