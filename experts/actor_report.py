"""What an expert actor tells its supervisor: once who it is, and then again and again how it does. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from experts.roster import Endpoint, ResidentExperts
from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class ActorIdentity:
    """Does not change while an actor lives."""

    service: str
    """Equal for all actors of one service, and of no other; see `ActorSpec.service`."""
    actor: str
    """The plan's actor that it stands for."""
    incarnation: int
    fingerprint: str
    """Equal for actors that compute the same rows for an expert of both; see `ActorSpec.fingerprint`."""
    budget_bytes: int | None
    """Of experts, from its start; it may be told to keep less, never more. None means no bound."""
    node_id: str
    """Ray's id of the node that it runs on."""
    endpoint: Endpoint
    keys: tuple[ExpertKey, ...]


@dataclass(frozen=True)
class ActorPulse:
    """The actor at a moment; counters are since its start."""

    num_active: int
    """Calls that it computes now."""
    busy_s: float
    """Time in which it computed."""
    rows: int
    hits: int
    misses: int
    resident: ResidentExperts


@dataclass(frozen=True)
class DiskReport:
    """What of the store is on an actor's machine at a moment."""

    weights: tuple[str, int] | None
    """Host and port where other machines get it; None where nobody may need to."""
    is_whole: bool
    """Whether the store is there in place, with every record."""
    held: frozenset[ExpertKey]
    """Experts of any group whose records are there; left empty where the store is whole."""
    free_bytes: int
    """For further records."""


@dataclass(frozen=True)
class Death:
    """In place of an answer: the actor is dead, or will never live."""

    error: str


Answer = ActorIdentity | ActorPulse | Death
