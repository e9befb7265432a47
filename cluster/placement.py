"""Which expert actor is responsible for which experts: a pure decision. Called by `cluster.supervisor`."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from extraction.manifest import ExpertKey, group_of


def split_experts(keys: Sequence[ExpertKey], num_groups: int) -> list[tuple[ExpertKey, ...]]:
    """Deal the experts of each layer out to `num_groups` groups, so that every layer's work is spread evenly.

    Returns groups of sorted keys; together they hold every key once. Raises ValueError for no group.
    """
    if num_groups < 1:
        raise ValueError(f"{num_groups} groups cannot hold {len(keys)} experts")
    groups: list[list[ExpertKey]] = [[] for _ in range(num_groups)]
    for key in sorted(keys):
        groups[group_of(key, num_groups)].append(key)
    return [tuple(group) for group in groups]


def plan_local(keys: Sequence[ExpertKey], num_actors: int, budgets: Sequence[int] = ()) -> ServicePlan:
    """The plan of one machine: `split_experts` over actors `experts-0`, `experts-1`, ...; Ray chooses their node.

    budgets: bytes of experts that each actor keeps, in the order of the actors; none means no bound. Without actors
    the routers' own process keeps every expert. Raises ValueError for another number of budgets than actors.
    """
    if budgets and len(budgets) != num_actors:
        raise ValueError(f"{len(budgets)} budgets for {num_actors} actors")
    if num_actors == 0:
        return ServicePlan((), (), tuple(sorted(keys)))
    groups = tuple(
        ExpertGroup(f"experts-{index}", group) for index, group in enumerate(split_experts(keys, num_actors))
    )
    actors = tuple(
        ActorPlan(group.name, group.name, budget_bytes=budgets[index] if budgets else None)
        for index, group in enumerate(groups)
    )
    return ServicePlan(groups, actors)
