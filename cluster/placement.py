"""Which expert actor is responsible for which experts: a pure decision. Called by `cluster.supervisor`."""

from __future__ import annotations

from collections.abc import Sequence

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
