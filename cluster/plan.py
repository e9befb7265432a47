"""What is to run where: groups of experts, the actors that answer for each, and their nodes. Plain values.

Made by `cluster.placement`, changed by `cluster.autoscaler`, carried out by `cluster.supervisor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that live and move together; an actor answers for one group."""

    name: str
    keys: tuple[ExpertKey, ...]
    """Sorted."""
    home: str | None = None
    """The node that placement made it for, where its first actor goes while there is room. None for any."""


@dataclass(frozen=True)
class CardShare:
    """What an expert actor that computes on a card has of it, and behind it."""

    num_gpus: float
    """As Ray counts it: one part in as many as there may be actors on a card."""
    host_budget_bytes: int
    """Of experts in host memory."""


@dataclass(frozen=True)
class ActorPlan:
    """One expert actor. Several with the same group are replicas of each other, on different nodes."""

    name: str
    """Unique in the plan."""
    group: str
    node_id: str | None = None
    """None where there is one machine, or Ray may choose."""
    budget_bytes: int | None = None
    """Of experts where they are computed; None for no bound."""
    num_gpus: float = 0.0
    """As Ray counts them."""
    host_budget_bytes: int | None = None
    """Of experts in host memory behind a card; None where none is computed on."""

    def on_card(self, share: CardShare | None) -> ActorPlan:
        """With a share of a card, where there is one."""
        if share is None:
            return self
        return replace(self, num_gpus=share.num_gpus, host_budget_bytes=share.host_budget_bytes)


@dataclass(frozen=True)
class ServicePlan:
    """Every expert is in exactly one group or in `router_keys`.

    A group without an actor is legal: its experts are computed from disk, by the routers' own workers.
    """

    groups: tuple[ExpertGroup, ...]
    actors: tuple[ActorPlan, ...]
    router_keys: tuple[ExpertKey, ...] = ()
    """Experts that routers keep in their own process: no message, and no actor. Sorted."""
    router_budget_bytes: int | None = None
    """Of experts in the memory of that process, those of lost actors included; None for no bound."""

    def __post_init__(self) -> None:
        names = [actor.name for actor in self.actors]
        if len(set(names)) != len(names):
            raise ValueError(f"actor names are not unique: {sorted(names)}")
        groups = [group.name for group in self.groups]
        if len(set(groups)) != len(groups):
            raise ValueError(f"group names are not unique: {sorted(groups)}")
        unknown = sorted({actor.group for actor in self.actors} - set(groups))
        if unknown:
            raise ValueError(f"actors of unknown groups: {unknown}")
        keys = [*self.router_keys, *(key for group in self.groups for key in group.keys)]
        if len(set(keys)) != len(keys):
            raise ValueError("an expert is in more than one group")

    def group(self, name: str) -> ExpertGroup:
        """Raises KeyError."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def owners(self) -> Mapping[ExpertKey, tuple[str, ...]]:
        """The actors that answer for an expert, in the plan's order. Experts without any are absent."""
        names: dict[str, list[str]] = {group.name: [] for group in self.groups}
        for actor in self.actors:
            names[actor.group].append(actor.name)
        return {
            key: tuple(names[group.name]) for group in self.groups if names[group.name] for key in group.keys
        }
