"""How much of the machines the service would use: its capacity state, from load alone. Pure.

REST is an idle service, WAKE a light load, FOCUS a usual one, CRISIS more than it can take at once. A state stands for
resident bytes (the seed's: half, one and two times the native number of experts in every layer) and for a number of
actors. A request's effort plays no part. Watched by `cluster.capacity_watch`, shown in status and metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

CapacityState = Literal["rest", "wake", "focus", "crisis"]
STATES: tuple[CapacityState, ...] = ("rest", "wake", "focus", "crisis")
"""In rising order."""

BUSY_SHARE, FULL_SHARE = 0.25, 0.75
"""Of the sequences that can run at once: from where on a load is FOCUS and CRISIS. Waiting ones make it CRISIS."""
REST_AFTER_S = 60.0
"""Without any request."""
FALL_AFTER_S = 15.0
"""How long a load must be lower before the state falls; it rises at once."""


@dataclass(frozen=True)
class Load:
    """What the service has to do at a moment."""

    num_running: int
    num_waiting: int
    max_running: int


@dataclass(frozen=True)
class Capacity:
    """The state, and since when the load has been lower than it. Times are of a monotonic clock, in seconds."""

    state: CapacityState = "rest"
    lower_since_s: float | None = None


@dataclass(frozen=True)
class ServiceSize:
    """What states are measured in."""

    num_layers: int
    """Layers with experts."""
    num_experts: int
    """Of a layer."""
    experts_per_token: int
    expert_bytes: int
    max_actors: int


def observe(capacity: Capacity, load: Load, now_s: float) -> Capacity:
    """The capacity after a look at the load: up at once, down after the load has stayed lower for a while."""
    wanted = _state_of(load)
    if STATES.index(wanted) >= STATES.index(capacity.state):
        return Capacity(wanted)
    since_s = now_s if capacity.lower_since_s is None else capacity.lower_since_s
    is_due = now_s - since_s >= (REST_AFTER_S if wanted == "rest" else FALL_AFTER_S)
    return Capacity(wanted) if is_due else Capacity(capacity.state, since_s)


def _state_of(load: Load) -> CapacityState:
    if not load.num_running and not load.num_waiting:
        return "rest"
    share = load.num_running / load.max_running
    if load.num_waiting or share > FULL_SHARE:
        return "crisis"
    return "focus" if share > BUSY_SHARE else "wake"


def resident_experts(state: CapacityState, size: ServiceSize) -> int:
    """Experts of each layer that the state keeps in memory. At rest one, so that there is something to begin with."""
    native = size.experts_per_token
    wanted = {"rest": 1, "wake": max(1, native // 2), "focus": native, "crisis": 2 * native}[state]
    return min(wanted, size.num_experts)


def resident_bytes(state: CapacityState, size: ServiceSize) -> int:
    return resident_experts(state, size) * size.num_layers * size.expert_bytes


def kept_share(state: CapacityState, size: ServiceSize) -> Fraction:
    """Of a process's experts, how many it may keep within its budget, where capacity is automatic.

    At rest what the state stands for. Under any load all of them: the states' bytes are for services that grow, and
    would take memory away that the user has given, just when it is of use.
    """
    if state != "rest" or not size.num_experts:
        return Fraction(1)
    return Fraction(resident_experts(state, size), size.num_experts)


def num_actors(state: CapacityState, size: ServiceSize) -> int:
    """See `num_actors_at`."""
    return num_actors_at(state, size.max_actors)


def num_actors_at(state: CapacityState, max_actors: int) -> int:
    """None at rest, half of them at WAKE, all otherwise. Half is rounded up."""
    if state == "rest":
        return 0
    return (max_actors + 1) // 2 if state == "wake" else max_actors


def present_state(state: CapacityState, size: ServiceSize) -> str:
    """As users read it: "idle (REST)", "WAKE (4 experts a layer)"."""
    return (
        "idle (REST)"
        if state == "rest"
        else f"{state.upper()} ({resident_experts(state, size)} experts a layer)"
    )
