"""Who is where: which actors answer for which experts, and at what addresses. Plain values.

Made by `cluster.supervisor`, followed by `experts.remote_directory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class Endpoint:
    """Where one life of an expert actor listens."""

    name: str
    host: str
    port: int
    incarnation: int

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


ResidentExperts = Mapping[tuple[str, int], frozenset[int]]
"""(component, layer) -> numbers of the experts that are in memory."""
Owners = Mapping[ExpertKey, tuple[str, ...]]
"""Expert -> names of actors, best first. Absent, or without a name, are experts that no actor answers for."""


@dataclass(frozen=True)
class Roster:
    """Which actors own which expert. `version` grows with every change."""

    version: int
    endpoints: Mapping[str, Endpoint]
    """Actor name -> where it listens. Actors that are down are absent."""
    owners: Owners
    """Several actors that own an expert are replicas of each other; each can be asked for it at any time."""
    resident: Mapping[str, ResidentExperts] = field(default_factory=dict)
    """Actor name -> what it held when it was last asked. Changes without a new version."""
    fallbacks: Owners = field(default_factory=dict)
    """Actors that do not own an expert but have its record on their disk: asked where no owner answers."""
